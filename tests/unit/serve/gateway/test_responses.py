"""What the service sends is what its response models, and so /openapi.json, describe."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from serve.gateway import responses
from serve.gateway.responses import ErrorBody
from tests.local import NAME

MESSAGES = [{"role": "user", "content": "Hello there"}]
ENDPOINTS = {
    "/v1/chat/completions": ({"messages": MESSAGES}, responses.ChatCompletion, responses.ChatChunk),
    "/v1/completions": ({"prompt": "Once"}, responses.TextCompletion, responses.TextChunk),
}
GUIDED = {"objective_weights": {"brief": 1, "positive": 3}, "tilt_cap": 2}
PREFERENCES = [{"text": "Be brief."}, {"text": "Be kind.", "weight": 0}]
STEERINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "guided": {**GUIDED, "n": 2},
    "preferences": {**GUIDED, "preferences": PREFERENCES, "stop": "e"},
    "greedy": {**GUIDED, "temperature": 0, "preferences": PREFERENCES[:1], "preference_params": {"preset": "anchor"}},
}


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(service.app())


@pytest.fixture(scope="module")
def described(client) -> dict:
    return client.get("/openapi.json").json()


def asked(path: str, steering: str, with_logprobs: bool) -> dict[str, Any]:
    logprobs = {"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2}
    body = {"model": NAME, "max_tokens": 5, "seed": 1, **ENDPOINTS[path][0], **STEERINGS[steering]}
    return {**body, **logprobs} if with_logprobs else body


def check(model: type[BaseModel], body: str) -> None:
    """As described, with nothing more, and nothing of another type."""
    model.model_validate_json(body)


@pytest.mark.parametrize("with_logprobs", [False, True])
@pytest.mark.parametrize("steering", STEERINGS)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_answers_are_as_described(client, path, steering, with_logprobs):
    _, whole, chunk = ENDPOINTS[path]
    body = asked(path, steering, with_logprobs)
    check(whole, client.post(path, json=body).text)
    streamed = client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    *events, done = filter(None, streamed.text.split("\n\n"))
    assert done == "data: [DONE]"
    for event in events:
        check(chunk, event.removeprefix("data: "))


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models", responses.ModelList),
        (f"/v1/models/{NAME}", responses.ModelObject),
        ("/v1/objectives", responses.ObjectiveList),
        ("/health", responses.Health),
        ("/v1/models/other", ErrorBody),
        ("/nowhere", ErrorBody),
    ],
)
def test_lists_health_and_errors_are_as_described(client, path, model):
    check(model, client.get(path).text)


def test_every_body_has_fields_in_the_description(described):
    schemas = described["components"]["schemas"]

    def described_fields(schema: dict) -> dict:
        return schemas[schema["$ref"].rpartition("/")[2]]["properties"]

    for path, methods in described["paths"].items():
        for method in methods.values():
            for response in method["responses"].values():
                assert described_fields(response["content"]["application/json"]["schema"])
        if path in ENDPOINTS:
            stream = methods["post"]["responses"]["200"]["content"]["text/event-stream"]
            for body in stream["itemSchema"]["properties"]["data"]["anyOf"][0]["contentSchema"]["anyOf"]:
                assert described_fields(body)


def test_every_reference_of_the_description_leads_somewhere(described):
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for child in node.values() for found in references(child)]
        return [found for child in node for found in references(child)] if isinstance(node, list) else []

    names = {reference.removeprefix("#/components/schemas/") for reference in references(described)}
    assert names <= set(described["components"]["schemas"])


def test_the_examples_are_as_described(described):
    for path, (_, whole, chunk) in ENDPOINTS.items():
        documented = described["paths"][path]["post"]["responses"]
        content = documented["200"]["content"]
        check(whole, json.dumps(content["application/json"]["example"]))
        *events, _ = filter(None, content["text/event-stream"]["example"].split("\n\n"))
        for event in events:
            check(chunk, event.removeprefix("data: "))
        for status in ("4XX", "5XX"):
            check(ErrorBody, json.dumps(documented[status]["content"]["application/json"]["example"]))
