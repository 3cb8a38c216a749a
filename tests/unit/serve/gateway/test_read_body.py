"""Whatever bytes a body has: an object without ambiguities, or an error that names what is wrong and the remedy."""

from __future__ import annotations

import gzip
import json

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from serve.gateway.protocol import ApiError
from serve.gateway.read_body import read_json
from serve.gateway.responses import ErrorBody
from tests.local import NAME

JSON = "application/json"
CHAT = "/v1/chat/completions"
GOOD = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Hi é"}], "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(service.app())


@pytest.mark.parametrize(
    ("raw", "headers", "words"),
    [
        (GOOD, {}, "no content type; send the header content-type: application/json"),
        (GOOD, {"content-type": "application/x-www-form-urlencoded"}, "send the header content-type: application/json"),
        (GOOD, {"content-type": "text/json"}, "send the header content-type: application/json"),
        (GOOD, {"content-type": f"{JSON}; charset=latin-1"}, "charset 'latin-1'; encode it as UTF-8"),
        (gzip.compress(GOOD), {"content-type": JSON, "content-encoding": "gzip"}, "content-encoding: gzip"),
        (gzip.compress(GOOD), {"content-type": JSON}, "is compressed (gzip); send it uncompressed"),
        (GOOD, {"content-type": JSON, "content-encoding": "br"}, "send it uncompressed"),
        ('{"user": "é"}'.encode("latin-1"), {"content-type": JSON}, "not UTF-8 (byte 0xe9 at 10)"),
        (b"\xff" + GOOD, {"content-type": JSON}, "not UTF-8 (byte 0xff at 0)"),
        (b"", {"content-type": JSON}, "is empty; send a JSON object"),
        (b" \n", {"content-type": JSON}, "is empty; send a JSON object"),
        (b"[" * 100_000, {"content-type": JSON}, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, {"content-type": JSON}, "nested too deeply"),
        (b'{"user": "a", "user": "b"}', {"content-type": JSON}, "the field 'user' is given twice"),
        (b'{"metadata": {"k": "a", "k": "b"}}', {"content-type": JSON}, "the field 'k' is given twice"),
        (b'{"temperature": NaN}', {"content-type": JSON}, "holds NaN, which is not JSON"),
        (b'{"temperature": -Infinity}', {"content-type": JSON}, "holds -Infinity, which is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", {"content-type": JSON}, "a number of 5000 digits"),
        (b"[]", {"content-type": JSON}, "is a JSON list; send an object"),
        (b'"prompt"', {"content-type": JSON}, "is a JSON str; send an object"),
        (b"{'model': 1}", {"content-type": JSON}, "at character 1; correct it"),
        (GOOD[:-1], {"content-type": JSON}, "is not valid JSON"),
        (GOOD + b"x", {"content-type": JSON}, "is not valid JSON: Extra data"),
        (b"model=tiny&prompt=a", {"content-type": JSON}, "is not valid JSON"),
        (b"\x00" * 8, {"content-type": JSON}, "is not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_remedy(client, raw, headers, words):
    for path in (CHAT, "/v1/completions"):
        response = client.post(path, content=raw, headers=headers)
        error = ErrorBody.model_validate_json(response.text).error
        assert (response.status_code, error.code) == (400, "invalid_json")
        assert words in error.message


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (GOOD, "application/json; charset=UTF-8"),
        (GOOD, "application/vnd.api+json"),
        (b"\xef\xbb\xbf" + GOOD, JSON),
        (GOOD.decode().encode("utf-16"), JSON),
        (b" \n" + GOOD + b"\n", "Application/JSON"),
    ],
)
def test_other_spellings_of_json_are_read(client, raw, kind):
    assert client.post(CHAT, content=raw, headers={"content-type": kind}).status_code == 200


HALF = "bad \ud83d end"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "messages.0.content.0.text",
        ),
        (CHAT, {"messages": [{"role": "system", "content": "\udc00"}]}, "messages.0.content"),
        (CHAT, {"stop": ["a", "\udfff"]}, "stop.1"),
        (CHAT, {"preferences": [{"text": HALF}]}, "preferences.0.text"),
        (CHAT, {"user": HALF}, "user"),
        (CHAT, {"metadata": {"a": HALF}}, "metadata.a"),
        (CHAT, {"metadata": {HALF: "a"}}, "metadata"),
        (CHAT, {"model": HALF}, "model"),
        (CHAT, {HALF: 1}, None),
        ("/v1/completions", {"prompt": HALF}, "prompt"),
        ("/v1/completions", {"prompt": ["a", HALF]}, "prompt.1"),
        ("/v1/completions", {"vllm_xargs": {"objective_weights": HALF}}, "vllm_xargs.objective_weights"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_refused_where_it_is(client, path, fields, param, stream):
    asked = {"prompt": "a"} if path != CHAT else {"messages": [{"role": "user", "content": "a"}]}
    body = json.dumps({"model": NAME, **asked, **fields, "stream": stream})
    response = client.post(path, content=body, headers={"content-type": JSON})
    error = ErrorBody.model_validate_json(response.text).error
    assert (response.status_code, error.param) == (400, param)
    assert "half of a character (\\ud" in error.message


def test_whole_characters_may_be_escaped():
    headers = Headers({"content-type": JSON})
    assert read_json(headers, b'{"user": "\\ud83d\\ude00 \\\\ud83d"}') == {"user": "😀 \\ud83d"}
    with pytest.raises(ApiError, match="half of a character"):
        read_json(headers, b'{"user": "\\ude00\\ud83d"}')
