"""Whatever JSON a client sends: an answer, or an error below 500 in OpenAI's shape that can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.door import Edge
from tests.local import NAME, OBJECTIVES

TEXT = st.text(st.characters(), max_size=20)  # with lone surrogates, which JSON can spell and UTF-8 cannot
NUMBER = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 10**400, 1e308]))
LEAF = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANYTHING = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6)
WEIGHT = st.one_of(st.floats(0, 5), st.floats(0, 5), NUMBER)
OBJECTIVE = st.one_of(*[st.sampled_from(OBJECTIVES)] * 5, TEXT)
POSITIVE = st.one_of(st.floats(0, 1e4), st.floats(0, 1e4), NUMBER)
WORDS = st.one_of(*[st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=20)] * 9, TEXT)
SENTENCE = st.fixed_dictionaries({"text": WORDS}, optional={"weight": WEIGHT})
PRESETS = st.sampled_from(["mato", "anchor", "linear_alignment", "opad", "context_steering", "amulet"])


def optional(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """An object with some of the fields; now and then a value of one is anything."""
    values = {name: st.one_of(*[known] * 12, ANYTHING) for name, known in fields.items()}
    return st.fixed_dictionaries({}, optional=values)


PARAMS = optional(
    preset=PRESETS,
    adapt=st.booleans(),
    tau=POSITIVE,
    accumulation=st.sampled_from(["mean", "sum", "decay"]),
    decay=POSITIVE,
    clip=POSITIVE,
    c=st.floats(0, 8),
    alpha=POSITIVE,
    lam=POSITIVE,
    nu=POSITIVE,
    steps=st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    normalise=st.booleans(),
)
FIELDS = optional(
    objective_weights=st.dictionaries(OBJECTIVE, WEIGHT, max_size=3),
    preferences=st.lists(SENTENCE, max_size=4),
    preference_params=PARAMS,
    beta=POSITIVE,
    tilt_cap=POSITIVE,
    scorer=st.sampled_from(["full", "full", "lazy", "lazy", "qhead"]),
    guide_every=st.integers(1, 5),
    temperature=POSITIVE,
    top_k=st.integers(1, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    n=st.integers(1, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(WORDS, max_size=3),
    metadata=st.dictionaries(TEXT, TEXT, max_size=2),
    stream=st.booleans(),
)


@pytest.fixture(scope="module")
def client(service) -> Iterator[TestClient]:
    with TestClient(service.app(Edge(log_access=False)), raise_server_exceptions=True) as client:
        yield client


def check(client: TestClient, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    if response.status_code == 200:
        assert '"error"' not in response.text
        assert response.text.endswith("data: [DONE]\n\n") or response.json()["choices"]
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 1100


FUZZED = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


@FUZZED
@given(
    fields=FIELDS,
    extra=st.one_of(*[st.just({})] * 9, st.dictionaries(TEXT, ANYTHING, max_size=1)),
    told=st.one_of(st.none(), st.integers(0, 5)),
)
@example({"objective_weights": {"\ud800": 1.0}}, {}, 2)
@example({"preferences": [{"text": "\ud800"}]}, {}, 2)
@example({"preferences": [{"text": "a"}], "preference_params": {"alpha": 1e308, "nu": 1e308}}, {}, 2)
@example({"temperature": 1e-320}, {}, 2)
@example({"temperature": 1e308}, {}, 2)
@example({"objective_weights": {"brief": 1e308, "positive": 1e308}, "beta": 1e308}, {}, 2)
@example({"objective_weights": {"brief": 5e-324}}, {}, 2)
def test_steering_fields(client, fields, extra, told):
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": told is not None, "top_logprobs": told}
    body = {"model": NAME, **asked, "max_tokens": 3, **fields, **extra}
    check(client, "/v1/chat/completions", json.dumps(body).encode())
    body = {"model": NAME, "prompt": "Hi", "logprobs": told, "max_tokens": 3, **fields, **extra}
    check(client, "/v1/completions", json.dumps(body).encode())


@FUZZED
@given(messages=st.lists(optional(role=st.sampled_from(["system", "user", "assistant"]), content=TEXT), max_size=4))
@example([{"role": "assistant", "content": ""}])
@example([{"role": "user", "content": "<|im_end|></s>"}])
@example([{"role": "user", "content": []}])
def test_messages(client, messages):
    body = {"model": NAME, "messages": messages, "max_tokens": 2}
    check(client, "/v1/chat/completions", json.dumps(body).encode())


@FUZZED
@given(weights=st.one_of(TEXT, st.from_regex(r"(brief|positive)=[0-9.e-]{1,5}(,(brief|positive)=[0-9.e-]{1,5})?")))
def test_flat_weights(client, weights):
    body = {"model": NAME, "prompt": "Hi", "max_tokens": 2, "vllm_xargs": {"objective_weights": weights}}
    check(client, "/v1/completions", json.dumps(body).encode())


@FUZZED
@given(body=ANYTHING)
def test_any_json(client, body):
    check(client, "/v1/completions", json.dumps(body).encode())


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
    check(client, "/v1/completions", content)
