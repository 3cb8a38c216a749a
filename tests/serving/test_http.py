"""The whole service: real HTTP, real replicas, random models."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.models.load import chat_ids, context_length, load_base, load_tokenizer
from mavis_dist.store.files import Store
from mavis_dist.types import RESIDUAL_CAP, TILT_CAP
from serve.base.replica import Base
from serve.gateway.build_request import Completions
from serve.gateway.protocol import ApiError
from serve.gateway.requests import ChatRequest
from serve.settings import main_args

HELLO = [{"role": "user", "content": "Hello there"}]
FLAT_FAME = {"objective_weights": "fame=1"}
BOTH = {"positive": 1.0, "brief": 3.0}


@pytest.fixture(scope="session")
def model(served_config) -> str:
    return served_config.base.model


@pytest.fixture
def body(model):
    return {"model": model, "messages": HELLO, "max_tokens": 24, "top_k": 20, "seed": 7, "objective_weights": BOTH}


def ask(http: httpx.Client, url: str, body: dict, path: str = "/v1/chat/completions") -> dict:
    response = http.post(f"{url}{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict, index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def events_of(http: httpx.Client, url: str, body: dict, path: str = "/v1/chat/completions") -> list[dict]:
    with http.stream("POST", f"{url}{path}", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed_text(events: list[dict], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_an_answer_reports_its_steering(http, url, body):
    answer = ask(http, url, body)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 24
    assert answer["mavis"] == {
        "objective_weights": {"positive": 0.25, "brief": 0.75},
        "beta": 1.0,
        "tilt_cap": TILT_CAP,
        "residual_cap": RESIDUAL_CAP,
        "guide_every": 1,
        "seed": 7,
    }
    assert choice["mavis"]["divergence"] > 0
    assert set(choice["mavis"]["values"]) == {"positive", "brief"}
    assert 3 <= choice["mavis"]["candidates_per_token"] < 20


def test_a_stream_and_a_whole_answer_agree(http, url, body):
    whole = ask(http, url, {**body, "n": 2})
    events = events_of(http, url, {**body, "n": 2, "stream_options": {"include_usage": True}})
    for index in range(2):
        assert streamed_text(events, index) == text_of(whole, index)
    assert text_of(whole, 0) != text_of(whole, 1)
    endings = [event for event in events if event["choices"] and event["choices"][0]["finish_reason"]]
    assert [event["mavis"] for event in endings] == [whole["mavis"]] * 2
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]


def test_a_request_that_never_fits_the_cache_is_refused(served_config, body):
    args = main_args(served_config).model_copy(update={"placement": "colocated", "cache_tokens": 20})
    completions = Completions(load_tokenizer(args.base), args, context_length(args.base), Base(args).stream)
    with pytest.raises(ApiError, match="cache of 20 tokens"):
        asyncio.run(
            completions.start(ChatRequest.model_validate(body), {"positive": "positive@i0", "brief": "brief@i0"})
        )


def test_both_placements_generate_the_same(http, url, served_config, body):
    args = main_args(served_config).model_copy(update={"placement": "colocated"})
    base = Base(args)  # what a base replica runs, in this process
    completions = Completions(load_tokenizer(args.base), args, context_length(args.base), base.stream)

    async def answer(body: dict) -> dict:
        versions = {"positive": "positive@i0", "brief": "brief@i0"}
        completion = await completions.start(ChatRequest.model_validate(body), versions)
        return await completion.whole()

    preferences = {"preferences": [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]}
    for steering in ({"seed": 0}, {"seed": 1}, {"seed": 2, **preferences}, {"seed": 3, **preferences, "beta": 0}):
        local = asyncio.run(answer({**body, **steering}))["choices"][0]
        remote = ask(http, url, {**body, **steering})["choices"][0]
        assert remote["message"] == local["message"]
        for one, other in zip(
            remote["mavis"].get("preferences", ()), local["mavis"].get("preferences", ()), strict=True
        ):
            assert one["final_weight"] == pytest.approx(other["final_weight"], abs=1e-4)
        assert remote["mavis"]["values"] == pytest.approx(local["mavis"]["values"], abs=1e-3)


@pytest.mark.parametrize("guide_every", [1, 3])
def test_answers_are_those_of_the_engine_in_this_process(http, url, served_config, body, guide_every):
    args = main_args(served_config).model_copy(update={"placement": "colocated"})
    base, store = load_base(args.base), Store(args.storage, args.run)
    params = SamplingParams(body["max_tokens"], top_k=body["top_k"], seed=body["seed"])
    prompt = tuple(chat_ids(base.tokenizer, HELLO, args.system))
    request = Request("r", prompt, BOTH, beta=1.0, params=params, guide_every=guide_every)
    [[choice]] = Engine(base, load_guide(fetch_published(store))).generate([request])
    answer = ask(http, url, {**body, "guide_every": guide_every})
    assert text_of(answer) == choice.text
    report = answer["choices"][0]["mavis"]
    assert report["divergence"] == pytest.approx(choice.divergence, abs=1e-3)
    assert report["candidates_per_token"] == pytest.approx(statistics.mean(filter(None, choice.num_scored)))


def test_answers_end_before_a_stop_string(http, url, body):
    text = text_of(ask(http, url, body))
    stop = text[10:14]
    expected = text[: text.find(stop)]
    answer = ask(http, url, {**body, "stop": stop})
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == (expected, "stop")
    events = events_of(http, url, {**body, "stop": [stop, "never"]})
    assert streamed_text(events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_weights_change_the_answer_and_zero_weights_are_the_base_model(http, url, body):
    plain = ask(http, url, {**body, "objective_weights": None})
    zero = ask(http, url, {**body, "objective_weights": {"positive": 0, "brief": 0}})
    no_strength = ask(http, url, {**body, "beta": 0})
    assert text_of(plain) == text_of(zero) == text_of(no_strength)
    assert zero["choices"][0]["mavis"] == {"divergence": 0.0, "values": {}, "candidates_per_token": 0.0}
    guided = {text_of(ask(http, url, {**body, "objective_weights": {name: 1}})) for name in BOTH}
    assert len({text_of(plain), *guided}) == 3


def test_flat_weights_are_the_nested_ones(http, url, body):
    flat = {**body, "objective_weights": None, "vllm_xargs": {"objective_weights": "positive=1,brief=3"}}
    assert text_of(ask(http, url, flat)) == text_of(ask(http, url, body))


def test_log_probabilities_are_those_of_the_engine_and_come_with_their_text(http, url, body):
    asked = {**body, "logprobs": True, "top_logprobs": 3}
    [choice] = ask(http, url, asked)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert sum(entry["mavis"]["divergence"] for entry in content) == pytest.approx(choice["mavis"]["divergence"])
    chunks = [event["choices"][0] for event in events_of(http, url, asked)]
    streamed = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    logprobs = [entry["logprob"] for entry in content]
    assert [entry["logprob"] for entry in streamed] == pytest.approx(logprobs, abs=1e-3)


def test_a_request_keeps_its_id(http, url, body):
    response = http.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert response.json()["id"].startswith("chatcmpl-mine-1-")
    assert len(http.get(f"{url}/v1/models").headers.get_list("x-request-id")) == 1


def test_a_body_that_is_too_large_is_refused(http, url, body):
    response = http.post(f"{url}/v1/chat/completions", json={**body, "user": "x" * 2**19})
    assert response.status_code == 413
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_missing_seed_is_drawn_and_reported(http, url, body):
    first = ask(http, url, {**body, "seed": None})
    again = ask(http, url, {**body, "seed": first["mavis"]["seed"]})
    assert text_of(first) == text_of(again)


def test_text_completions(http, url, model):
    body = {"model": model, "prompt": "Once upon", "max_tokens": 8, "top_k": 20, "seed": 1}
    whole = ask(http, url, body, "/v1/completions")
    assert whole["object"] == "text_completion"
    events = events_of(http, url, body, "/v1/completions")
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_many_at_once_do_not_change_each_other(http, url, body):
    alone = [text_of(ask(http, url, {**body, "seed": seed})) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: text_of(ask(http, url, {**body, "seed": seed})), range(8)))
    assert together == alone


def test_lists(http, url, model):
    assert [m["id"] for m in http.get(f"{url}/v1/models").json()["data"]] == [model]
    assert http.get(f"{url}/v1/models/{model.lstrip('/')}").status_code in (200, 404)
    listed = http.get(f"{url}/v1/objectives").json()["data"]
    assert [(o["id"], o["version"], o["iteration"], o["value_replicas"]) for o in listed] == [
        ("brief", "brief@i0", 0, 1),
        ("positive", "positive@i0", 0, 1),
    ]
    assert http.get(f"{url}/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"objective_weights": {"fame": 1}}, 400, "objective_weights"),
        ({"objective_weights": {"brief": -1}}, 400, "objective_weights"),
        (
            {"objective_weights": None, "vllm_xargs": {"objective_weights": "fame=1"}},
            400,
            "vllm_xargs.objective_weights",
        ),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"n": 17}, 400, "n"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "messages"),
        ({"max_tokens": 401}, 400, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 401}, 400, "max_completion_tokens"),
        ({"temperature": -0.5}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop.0"),
        ({"guide_every": 0}, 400, "guide_every"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_refusals_name_the_field(http, url, body, change, status, param):
    for stream in (False, True):
        response = http.post(f"{url}/v1/chat/completions", json={**body, **change, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == status
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert error["message"]


def test_errors_of_routing_and_parsing_have_the_same_format(http, url):
    chat = f"{url}/v1/chat/completions"
    for response, status in [
        (http.get(f"{url}/v1/nothing"), 404),
        (http.get(chat), 405),
        (http.post(chat, content="{not json", headers={"content-type": "application/json"}), 400),
        (http.post(chat, content="[]", headers={"content-type": "application/json"}), 400),
        (http.post(chat), 400),
    ]:
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_official_client(url, body):
    extra = {"top_k": body.pop("top_k"), "objective_weights": body.pop("objective_weights")}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(**body, extra_body=extra)
        stream = client.chat.completions.create(**body, extra_body=extra, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == answer.choices[0].message.content
        assert answer.model_extra["mavis"]["seed"] == body["seed"]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**body, extra_body={"objective_weights": {"fame": 1}})
        assert caught.value.param == "objective_weights"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**body, "model": "other"})


def wait_until_idle(http: httpx.Client, url: str) -> None:
    """Two base replicas take turns in answering: waits for several idle answers in a row."""
    deadline, idle = time.monotonic() + 15, 0
    while idle < 8:
        assert time.monotonic() < deadline
        load = http.get(f"{url}/health").json()
        idle = idle + 1 if load["running"] + load["waiting"] == 0 else 0
        time.sleep(0.05)


def test_a_client_that_leaves_its_stream_frees_the_row(http, url, body):
    long = {**body, "max_tokens": 400, "stream": True}
    with http.stream("POST", f"{url}/v1/chat/completions", json=long) as response:
        next(response.iter_lines())
    started = time.monotonic()
    wait_until_idle(http, url)
    assert time.monotonic() - started < 4


def test_a_client_that_stops_waiting_frees_the_rows(http, url, body):
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 400, "n": 8}, timeout=0.5)
    started = time.monotonic()
    wait_until_idle(http, url)
    assert time.monotonic() - started < 4


def test_the_playground_is_the_first_page(http, url):
    response = http.get(f"{url}/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "v1/objectives" in response.text
