"""The HTTP routes and their middleware, over a real engine in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import httpx
import openai
import pytest
from fastapi import Request as HttpRequest
from fastapi.testclient import TestClient

from serve import logs
from serve.gateway import api_keys
from serve.gateway.api_keys import Keys
from serve.gateway.responses import ErrorBody
from tests.local import NAME, OBJECTIVES, listening

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello there"}]
BODY = {"model": NAME, "messages": MESSAGES, "max_tokens": 8, "top_k": 20, "seed": 7}
STEERING = {"objective_weights": {"brief": 1.0, "positive": 3.0}, "scorer": "full"}
SECRET = "the moon is made of cheese"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def key(key_file) -> str:
    return api_keys.add(key_file, "ann")


@pytest.fixture
def keyed(service, key, key_file) -> TestClient:
    return TestClient(service.app(keys=Keys(key_file)))


@pytest.fixture
def open_client(service) -> TestClient:
    return TestClient(service.app())


def error_of(response: httpx.Response) -> dict:
    return ErrorBody.model_validate_json(response.text).model_dump()["error"]


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer none", "Basic {key}", "{key}", "Bearer {key}x"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/models", "/v1/objectives", "/metrics", "/elsewhere"])
def test_requests_without_a_valid_key_are_refused(keyed, key, header, path):
    headers = {} if header is None else {"authorization": header.format(key=key)}
    for response in (keyed.get(path, headers=headers), keyed.post(path, headers=headers, content=b"{")):
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_valid_key_is_accepted(keyed, key):
    for scheme in ("Bearer", "bearer"):
        assert keyed.get("/v1/models", headers={"authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/openapi.json"])
def test_probes_and_the_description_need_no_key(keyed, path):
    assert keyed.get(path).status_code == 200


def test_routes_get_the_name_of_the_key(service, key, key_file):
    app = service.app(keys=Keys(key_file))

    @app.get("/v1/me")
    async def me(request: HttpRequest) -> dict:
        return {"key": request.state.key, "id": request.state.request_id}

    headers = {"authorization": f"Bearer {key}", "x-request-id": "abc"}
    assert TestClient(app).get("/v1/me", headers=headers).json() == {"key": "ann", "id": "abc"}


# --- size, ids, origins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(service, is_chunked):
    client = TestClient(service.app(max_body_bytes=1000))
    content = json.dumps({**BODY, "user": "x" * 1000}).encode()
    sent = iter([content[:500], content[500:]]) if is_chunked else content
    response = client.post(CHAT, content=sent, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "1000 bytes" in error_of(response)["message"]
    assert client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("", False), ("é", False)],
)
def test_a_request_keeps_a_valid_id_and_gets_one_otherwise(open_client, given, is_kept):
    response = open_client.post(CHAT, json=BODY, headers={"x-request-id": given.encode()})
    request_id = response.headers["x-request-id"]
    assert (request_id == given) is is_kept
    assert response.json()["id"].startswith(f"chatcmpl-{request_id}-")
    again = open_client.post(CHAT, json=BODY, headers={"x-request-id": request_id})
    assert again.json()["id"] != response.json()["id"]


def test_errors_have_an_id_as_well(open_client):
    assert open_client.get("/nowhere").headers["x-request-id"]


def test_pages_of_other_origins_are_refused_unless_listed(service, open_client):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in open_client.get("/health", headers=asked).headers
    assert open_client.options(CHAT, headers=asked).status_code == 405
    client = TestClient(service.app(cors_origins=("https://page.example",)))
    assert client.options(CHAT, headers=asked).headers["access-control-allow-origin"] == "https://page.example"
    assert (
        "access-control-allow-origin" not in client.get("/health", headers={"origin": "https://other.example"}).headers
    )


def test_an_internal_error_has_the_format_of_an_error(service):
    app = service.app()

    @app.get("/v1/broken")
    async def broken() -> None:
        raise RuntimeError(SECRET)

    response = TestClient(app).get("/v1/broken")
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert SECRET not in response.text


# --- logs --------------------------------------------------------------------------------------------------------


def lines(caplog) -> list[dict]:
    return [json.loads(logs.JsonLines().format(record)) for record in caplog.records if record.name == "serve.access"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_is_logged_without_its_text(keyed, key, caplog, is_streamed):
    caplog.set_level(logging.INFO, "serve")
    body = {**BODY, "messages": [{"role": "user", "content": SECRET}], "stream": is_streamed}
    answer = keyed.post(CHAT, json=body, headers={"authorization": f"Bearer {key}", "x-request-id": "r1"})
    [line] = lines(caplog)
    assert line["message"] == f"POST {CHAT} 200"
    assert (line["request_id"], line["key"], line["status"], line["level"]) == ("r1", "ann", 200, "info")
    assert line["completion"] in answer.text
    assert (line["completion_tokens"], line["finish_reasons"], line["failure"]) == (8, ["length"], None)
    assert line["duration_ms"] > 0
    assert not any(text in json.dumps(line) for text in (SECRET, key))


def test_prompts_are_logged_on_request_and_refusals_always(service, caplog):
    caplog.set_level(logging.INFO, "serve")
    client = TestClient(service.app(log_prompts=True))
    client.post(CHAT, json={**BODY, "messages": [{"role": "user", "content": SECRET}]})
    client.post(CHAT, json={**BODY, "objective_weights": {"fame": 1}})
    client.get("/%0A" + "x" * 500)
    told, refused, lost = lines(caplog)
    assert told["body"]["messages"][0]["content"] == SECRET
    assert (refused["status"], lost["status"]) == (400, 404)
    assert len(lost["path"]) <= 200


def test_a_log_line_is_one_line():
    record = logging.LogRecord("serve", logging.ERROR, "", 0, "a\n%s", ("\ud800",), None)
    assert len(logs.JsonLines().format(record).splitlines()) == 1


# --- lists and description ---------------------------------------------------------------------------------------


def test_objectives_are_described_with_their_quality(open_client):
    listed = open_client.get("/v1/objectives").json()["data"]
    assert [one["id"] for one in listed] == list(OBJECTIVES)
    assert listed[0] == {
        "id": "brief",
        "object": "objective",
        "version": "brief@i0",
        "iteration": 0,
        "distilled": False,
        "reward": {"reward": "sentiment"},
        "scale": {"mean": 0.0, "sd": 1.0},
        "max_tokens": 400,
        "explained_variance": None,
        "gate": None,
        "value_replicas": None,
    }


def test_the_description_requires_a_key_where_the_server_does(keyed, open_client):
    for client, is_keyed in ((keyed, True), (open_client, False)):
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method in methods.values():
                assert ("security" in method) == (is_keyed and path != "/health")


def test_the_description_has_examples_that_work(open_client):
    described = open_client.get("/openapi.json").json()
    for path in (CHAT, "/v1/completions"):
        route = described["paths"][path]["post"]
        assert set(route["responses"]) == {"200", "4XX", "5XX"}
        for example in route["requestBody"]["content"]["application/json"]["examples"].values():
            response = open_client.post(path, json={**example["value"], "model": NAME})
            assert response.status_code == 200, response.text
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert all("description" in fields[name] for name in ("objective_weights", "beta", "preferences", "scorer"))


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{NAME}", "/", "/v1/objectives"])
def test_head_has_the_headers_of_get_and_no_body(open_client, path):
    got, head = open_client.get(path), open_client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert open_client.head("/nowhere").status_code == 404
    assert open_client.head(CHAT).status_code == 405


def test_a_slash_at_the_end_is_answered_and_not_redirected(open_client, keyed, key):
    for path in ("/health/", "/v1/models/", f"/v1/models/{NAME}/", "/openapi.json/"):
        assert open_client.get(path, follow_redirects=False).json() == open_client.get(path[:-1]).json()
    for path, asked in ((CHAT, BODY), ("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2})):
        assert open_client.post(f"{path}/", json=asked, follow_redirects=False).status_code == 200
    assert keyed.get("/health/").status_code == 200
    assert keyed.get("/v1/models/").status_code == 401
    assert keyed.get("/v1/models/", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_an_unknown_route_says_where_the_others_are(open_client):
    error = error_of(open_client.post("/chat/completions", json=BODY))
    assert error["message"] == "POST /chat/completions: no such route; /openapi.json lists all"


def test_the_model_is_called_as_the_service_is_told(service):
    client = TestClient(service.app(served_model_name="mine"))
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mine"]
    assert client.get("/v1/models/mine").json()["id"] == client.get("/health").json()["model"] == "mine"
    assert client.get(f"/v1/models/{NAME}").status_code == 404


# --- clients -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(service, key, key_file) -> Iterator[str]:
    with listening(service.app(keys=Keys(key_file))) as url:
        yield f"{url}/v1"


def test_the_official_client_reads_log_probabilities(url, key):
    asked = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 8, "seed": 7}
    asked |= {"logprobs": True, "top_logprobs": 3, "extra_body": {**STEERING, "top_k": 20}}
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert answer._request_id
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.model_extra["mavis"].keys() == {"logratio", "divergence"} for entry in content)
    streamed = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-4)
    assert chunks[-1].usage.completion_tokens == 8
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_the_official_client_reads_text_completions(url, key):
    asked = {"model": NAME, "prompt": "Once", "max_tokens": 8, "seed": 7, "logprobs": 2, "extra_body": STEERING}
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        answer = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert len(answer.choices[0].logprobs.token_logprobs) == len(answer.choices[0].logprobs.top_logprobs)


def test_the_official_client_understands_refusals(url, key):
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]
        for change, param in (({"n": 4}, "n"), ({"tools": [{}]}, "tools"), ({"messages": MESSAGES * 50}, "messages")):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**{"model": NAME, "messages": MESSAGES, **change})
            assert caught.value.param == param
