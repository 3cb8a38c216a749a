"""Any JSON body gets an answer, or an error below 500 in OpenAI's format with a readable message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings

from benchmarks.chaos.fuzz import TEMPLATES, draw_examples
from benchmarks.chaos.fuzz_fields import (
    ANYTHING,
    EXTRA,
    FIELDS,
    FLAT_WEIGHTS,
    LOGPROBS,
    MESSAGES,
    PROMPT,
    chat,
    conversations,
    sent_bytes,
    text,
)
from benchmarks.common.http_load import CHAT, COMPLETIONS
from tests.local import NAME, LocalService


@pytest.fixture(scope="module")
def client(service) -> Iterator[TestClient]:
    with TestClient(service.app(log_access=False), raise_server_exceptions=True) as client:
        yield client


JSON = {"content-type": "application/json"}


def check(client: TestClient, path: str, content: bytes, headers: Mapping[str, str] = JSON) -> int:
    response = client.post(path, content=content, headers=dict(headers))
    if response.status_code == 200:
        assert '"error"' not in response.text
        assert response.text.endswith("data: [DONE]\n\n") or response.json()["choices"]
        return response.status_code
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 1100
    return response.status_code


FUZZED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=60
)


@FUZZED
@given(fields=FIELDS, extra=EXTRA, logprobs=LOGPROBS)
@example({"objective_weights": {"\ud800": 1.0}}, {}, 2)
@example({"preferences": [{"text": "\ud800"}]}, {}, 2)
@example({"preferences": [{"text": "a"}], "preference_params": {"alpha": 1e308, "nu": 1e308}}, {}, 2)
@example({"temperature": 1e-320}, {}, 2)
@example({"temperature": 1e308}, {}, 2)
@example({"objective_weights": {"brief": 1e308, "positive": 1e308}, "beta": 1e308}, {}, 2)
@example({"objective_weights": {"brief": 5e-324}}, {}, 2)
def test_steering_fields(client, fields, extra, logprobs):
    for path, body in ((CHAT, chat), (COMPLETIONS, text)):
        check(client, path, json.dumps(body(NAME, {**fields, **extra}, logprobs)).encode())


@FUZZED
@given(messages=MESSAGES)
@example([{"role": "assistant", "content": ""}])
@example([{"role": "user", "content": "<|im_end|></s>"}])
@example([{"role": "user", "content": []}])
def test_messages(client, messages):
    check(client, CHAT, json.dumps(chat(NAME, {"messages": messages})).encode())


@FUZZED
@given(prompt=PROMPT, fields=FIELDS)
@example(["a", "b"], {"stream": True, "echo": True})
@example(["a", "\0"], {})
@example("a", {"preferences": [{"text": "\0"}]})
@example([[5], [6]], {"n": 1})
def test_prompts(client, prompt, fields):
    check(client, COMPLETIONS, json.dumps(text(NAME, {**fields, "prompt": prompt})).encode())


@FUZZED
@given(sent=sent_bytes(NAME))
def test_bytes(client, sent):
    path, content, headers = sent
    check(client, path, content, headers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(tmp_path, name):
    service = LocalService(tmp_path, TEMPLATES[name])
    client = TestClient(service.app(log_access=False))
    bodies = [json.dumps(asked).encode() for _, asked in draw_examples(conversations(NAME), 20, 0)]
    statuses = {check(client, CHAT, body) for body in bodies}
    assert (200 in statuses) == (name != "fails")
    service.loop.stop()


@FUZZED
@given(weights=FLAT_WEIGHTS)
def test_flat_weights(client, weights):
    flat = {"vllm_xargs": {"objective_weights": weights}}
    check(client, COMPLETIONS, json.dumps(text(NAME, flat)).encode())


@FUZZED
@given(body=ANYTHING)
def test_any_json(client, body):
    check(client, COMPLETIONS, json.dumps(body).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "prompt": ""}',
        b'"\\ud800"',
    ],
)
def test_bytes_that_are_hard_to_parse(client, content):
    check(client, COMPLETIONS, content)
