"""Request bodies to responses and events, over a real engine in this process, without HTTP."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
import statistics
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from mavis_dist.decode import (
    Candidate,
    Choice,
    Engine,
    LocalGuide,
    Preference,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from mavis_dist.decode.text import StoppedText
from mavis_dist.models.load import BaseModel, load_base
from serve.base.engine_loop import EngineLoop, stream
from serve.gateway import failover
from serve.gateway.build_request import Completions
from serve.gateway.logprobs import Alignment, Speller, text_logprobs
from serve.gateway.protocol import ApiError
from serve.gateway.requests import ChatRequest, TextRequest
from serve.gateway.responses import ChatChunk, ChatCompletion, TextChunk, TextCompletion
from serve.messages import Admission, BaseLost
from tests.fakes import tiny_value
from tests.local import args_of
from tests.tiny import make_spaced_tokenizer, write_base

PROMPT = "Once upon a time"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(failover, "RETRY_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseModel:
    return load_base(str(write_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def loop(base) -> Iterator[EngineLoop]:
    loop = EngineLoop(make_engine(base))
    yield loop
    loop.stop()


def make_engine(base: BaseModel) -> Engine:
    vocabulary = base.model.config.vocab_size
    models = {name: tiny_value(seed, vocab=vocabulary) for seed, name in enumerate(("a", "b"))}
    return Engine(base, LocalGuide(models), max_rows=4)


class Service:
    """Completions whose base replica dies after some messages, as often as asked."""

    def __init__(self, base: BaseModel, loop: EngineLoop, num_deaths: int = 0, num_messages: int = 4):
        args = args_of("tiny", rows=4, max_tokens=400, stall_s=5, deadline_s=20)
        self._completions = Completions(base.tokenizer, args, 1024, self._open)
        self._loop, self._deaths_left, self._num_messages = loop, num_deaths, num_messages

    async def _open(self, request: Request, admission: Admission):
        dies, self._deaths_left = self._deaths_left > 0, self._deaths_left - 1
        num_left = self._num_messages
        async with aclosing(stream(self._loop, request, admission)) as messages:
            async for message in messages:
                yield message
                num_left -= 1
                if dies and not num_left:
                    raise BaseLost("killed")

    def whole(self, body_type: type = TextRequest, **fields) -> dict:
        async def run():
            return await (await self._completions.start(body(body_type, **fields), {"a": "a", "b": "b"})).whole()

        answer = asyncio.run(run())
        (ChatCompletion if body_type is ChatRequest else TextCompletion).model_validate_json(
            json.dumps(answer, allow_nan=False)
        )
        return answer

    def events(self, body_type: type = TextRequest, **fields) -> list[dict]:
        async def run():
            completion = await self._completions.start(body(body_type, stream=True, **fields), {"a": "a", "b": "b"})
            return [line.removeprefix("data: ").strip() async for line in completion.events()]

        *lines, done = asyncio.run(run())
        assert done == "[DONE]"
        for line in lines:
            (ChatChunk if body_type is ChatRequest else TextChunk).model_validate_json(line)
        return [json.loads(line) for line in lines]


def body(body_type: type = TextRequest, **fields) -> TextRequest | ChatRequest:
    steering = {"objective_weights": {"a": 1.0, "b": 1.0}, "top_k": 20}
    params = {"model": "tiny", "max_tokens": 30, "seed": 3}
    asked = {"prompt": PROMPT} if body_type is TextRequest else {"messages": [{"role": "user", "content": PROMPT}]}
    return body_type.model_validate({**params, **asked, **steering, **fields})


@pytest.fixture
def service(base, loop) -> Service:
    return Service(base, loop)


def choice_of(answer: dict) -> dict:
    [choice] = answer["choices"]
    return choice


def in_process(base: BaseModel, **fields) -> Choice:
    """The engine's own answer."""
    params = SamplingParams(30, top_k=20, seed=3)
    prompt = tuple(base.tokenizer(PROMPT)["input_ids"])
    [[choice]] = make_engine(base).generate([Request("r", prompt, {"a": 1.0, "b": 1.0}, 1.0, params=params, **fields)])
    return choice


def test_qhead_without_a_student_is_refused_with_the_field_of_the_body(service):
    with pytest.raises(ApiError) as refused:
        service.whole(scorer="qhead")
    assert (refused.value.status, refused.value.param) == (400, "scorer")
    assert refused.value.message == "scorer: is 'qhead'; there is no student for a, b: use 'lazy' or 'full'"


def test_the_report_of_a_guided_answer(service, base):
    report, choice = choice_of(service.whole())["mavis"], in_process(base)
    assert report["divergence"] == pytest.approx(choice.divergence, abs=1e-3)
    assert report["values"] == {name: pytest.approx(choice.values[name][-1], abs=1e-4) for name in ("a", "b")}
    assert report["candidates_per_token"] == pytest.approx(statistics.mean(choice.num_scored))


def test_the_report_of_an_answer_without_guidance(service):
    report = choice_of(service.whole(objective_weights=None))["mavis"]
    assert report == {"divergence": 0.0, "values": {}, "candidates_per_token": 0.0}


def test_guiding_some_tokens_only(service, base):
    choice = choice_of(service.whole(guide_every=4))
    expected = in_process(base, guide_every=4)
    assert choice["text"] == expected.text != in_process(base).text
    of_guided = statistics.mean(filter(None, expected.num_scored))
    assert choice["mavis"]["candidates_per_token"] == pytest.approx(of_guided)
    assert math.isnan(expected.values["a"][-1])
    assert choice["mavis"]["values"]["a"] == pytest.approx(expected.values["a"][28], abs=1e-4)


def test_unknown_values_are_null(base, loop, service):
    assert choice_of(service.whole(temperature=0))["mavis"]["divergence"] is None
    # The replica that ends the answer guides none of its last tokens.
    moved = Service(base, loop, num_deaths=1).whole(guide_every=1000, max_tokens=60)
    assert choice_of(moved)["mavis"] == {
        "divergence": None,
        "values": {"a": None, "b": None},
        "candidates_per_token": 0.0,
    }


def test_the_response_repeats_the_applied_steering(service):
    assert service.whole(guide_every=2, beta=2)["mavis"] == {
        "objective_weights": {"a": 0.5, "b": 0.5},
        "beta": 2.0,
        "tilt_cap": 3.0,
        "residual_cap": 1.0,
        "guide_every": 2,
        "seed": 3,
    }


@pytest.mark.parametrize("num_deaths", [0, 1, 3])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 1), (5, 3), (9, 12)])
def test_an_answer_ends_before_its_stop_string(base, loop, start, length, num_deaths):
    text = in_process(base).text
    stop = text[start : start + length]
    expected = text[: text.find(stop)]
    whole = Service(base, loop, num_deaths).whole(stop=stop)
    assert (choice_of(whole)["text"], choice_of(whole)["finish_reason"]) == (expected, "stop")
    assert whole["usage"]["completion_tokens"] == len(expected) + length  # one character per token
    sent = ""
    events = Service(base, loop, num_deaths).events(stop=["never", stop])
    for event in events:
        sent += choice_of(event)["text"]
        assert expected.startswith(sent)
    assert sent == expected
    assert [choice_of(event)["finish_reason"] for event in events if choice_of(event)["finish_reason"]] == ["stop"]


def test_the_beginning_of_a_stop_string_is_sent_in_the_end(service, base):
    text = in_process(base).text
    stop = text[-3:] + "!?"
    choice = choice_of(service.whole(stop=stop))
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert "".join(choice_of(event)["text"] for event in service.events(stop=stop)) == text


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat_answer(service):
    answer = choice_of(service.whole(ChatRequest, logprobs=True, top_logprobs=5, scorer="full"))
    content = answer["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer["message"]["content"]
    assert len(content) == 30
    for entry in content:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 5
        assert all(entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0 for entry in content)
        assert set(entry["top_logprobs"][0]) == {"token", "logprob", "bytes", "mavis"}
    spent = math.fsum(entry["mavis"]["divergence"] for entry in content)
    assert spent == pytest.approx(answer["mavis"]["divergence"])
    assert choice_of(service.whole(ChatRequest))["logprobs"] is None
    assert choice_of(service.whole(ChatRequest, logprobs=True))["logprobs"]["content"][0]["top_logprobs"] == []


def test_log_probabilities_of_a_text_answer(service):
    answer = choice_of(service.whole(logprobs=2))
    logprobs = answer["logprobs"]
    assert shown(logprobs["tokens"]) == answer["text"]
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] < len(answer["text"])
    assert {len(column) for column in logprobs.values()} == {30}
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


@pytest.mark.parametrize("body_type", [ChatRequest, TextRequest])
@pytest.mark.parametrize("stop", [None, "x", "q ", "7z"])
def test_streamed_log_probabilities_come_with_their_text_also_from_another_replica(base, loop, body_type, stop):
    asked = {"logprobs": True, "top_logprobs": 2} if body_type is ChatRequest else {"logprobs": 2}
    whole = choice_of(Service(base, loop).whole(body_type, stop=stop, max_tokens=60, **asked))
    for num_deaths in (0, 2):
        events = Service(base, loop, num_deaths, 5).events(body_type, stop=stop, max_tokens=60, **asked)
        joined: dict[str, list] = {}
        for event in map(choice_of, events):
            text = event["delta"].get("content", "") if body_type is ChatRequest else event["text"]
            logprobs = event["logprobs"] or {}
            tokens = logprobs.get("tokens", [entry["token"] for entry in logprobs.get("content", ())])
            assert shown(tokens) == text
            for name, column in logprobs.items():
                joined[name] = joined.get(name, []) + (column or [])
        told = {name: column or [] for name, column in whole["logprobs"].items()}
        assert rounded(joined) == rounded(told)


def shown(tokens: list[str]) -> str:
    """The text of tokens, of which some are parts of characters that were never finished."""
    return re.sub(r"bytes:\\x..", "\ufffd", "".join(tokens))


def rounded(tree):
    """Two replicas may differ in the last digits."""
    if isinstance(tree, dict):
        return {name: rounded(branch) for name, branch in tree.items()}
    if isinstance(tree, list):
        return [rounded(branch) for branch in tree]
    return pytest.approx(tree, abs=1e-4) if isinstance(tree, float) else tree


def test_parts_of_characters_wait_for_each_other(base):
    spell = Speller(base.tokenizer)
    e_acute = base.tokenizer("é")["input_ids"]
    assert [spell(token).bytes for token in e_acute] == [[0xC3], [0xA9]]
    assert spell(1) == ("</s>", list(b"</s>"))
    logprobs = [TokenLogprobs(Candidate(token, -1.0, 0.0), 0.0, ()) for token in [*e_acute, 1]]
    alignment = Alignment(StoppedText(base.tokenizer))
    assert alignment.add(e_acute[:1], logprobs[:1], False) == ("", [])
    text, entries = alignment.add([e_acute[1], 1], logprobs[1:], True)
    assert (text, [(entry.logprobs, entry.start) for entry in entries]) == ("é", [(logprobs[0], 0), (logprobs[1], 0)])
    assert text_logprobs(entries, spell)["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"preferences": [{"text": "a"}] * 17}, "preferences"),
        ({"prompt": "x" * 1024}, "prompt"),
        ({"model": "x" * 10_000}, "model"),
    ],
)
def test_values_beyond_the_limits_are_refused_by_name(service, fields, param):
    with pytest.raises(ApiError) as refused:
        service.whole(**fields)
    assert refused.value.param == param
    assert len(refused.value.message) < 300


# --- objectives in words -----------------------------------------------------------------------------------------

SENTENCES = [{"text": "Be brief.", "weight": 3}, {"text": "Be odd.", "weight": 0}, {"text": "Be kind."}]


def test_preferences_steer_and_are_reported(service, base):
    answer = service.whole(preferences=SENTENCES)
    choice, echo = choice_of(answer), answer["mavis"]
    assert choice["text"] != choice_of(service.whole())["text"]
    assert [(p["text"], p["weight"]) for p in echo["preferences"]] == [
        ("Be brief.", 0.75),
        ("Be odd.", 0.0),
        ("Be kind.", 0.25),
    ]
    assert echo["preference_params"]["c"] == pytest.approx(1.9347, abs=1e-4)
    assert echo["prompt_template"] == "none"
    brief, odd, kind = choice["mavis"]["preferences"]
    assert brief["final_weight"] + kind["final_weight"] == pytest.approx(1)
    assert brief["mean_weight"] + kind["mean_weight"] == pytest.approx(1)
    assert odd == {"text": "Be odd.", "final_weight": 0.0, "mean_weight": 0.0, "mean_reward": None}
    params = SamplingParams(30, top_k=20, seed=3)
    prompts = [tuple(base.tokenizer(f"{s}{PROMPT}")["input_ids"]) for s in ("", "Be brief.\n\n", "Be kind.\n\n")]
    preferences = (Preference("Be brief.", prompts[1], 3), Preference("Be kind.", prompts[2], 1))
    request = Request("r", prompts[0], {"a": 1.0, "b": 1.0}, 1.0, preferences=preferences, params=params)
    [[expected]] = make_engine(base).generate([request])
    assert choice["text"] == expected.text
    assert choice["mavis"]["worded_divergence"] == pytest.approx(expected.preference_divergence, abs=1e-3)
    assert choice["mavis"]["divergence"] == pytest.approx(expected.divergence, abs=1e-3)


def test_preferences_survive_the_loss_of_a_base_replica(base, loop, service):
    expected = choice_of(service.whole(preferences=SENTENCES))
    moved = choice_of(Service(base, loop, num_deaths=2).whole(preferences=SENTENCES))
    assert moved["text"] == expected["text"]
    for one, other in zip(moved["mavis"]["preferences"], expected["mavis"]["preferences"], strict=True):
        assert one["final_weight"] == pytest.approx(other["final_weight"], abs=1e-4)
    assert moved["mavis"]["worded_divergence"] is None
    events = service.events(preferences=SENTENCES)
    assert "".join(choice_of(event)["text"] for event in events) == expected["text"]
    assert choice_of(events[-1])["mavis"] == expected["mavis"]


def test_a_preset_and_what_changes_of_it(service):
    params = {"preset": "amulet", "steps": 3, "accumulation": "sum", "normalise": True}
    echo = service.whole(preferences=SENTENCES[:1], preference_params=params)["mavis"]["preference_params"]
    assert (echo["adapt"], echo["alpha"], echo["steps"], echo["accumulation"]) == (False, 2.0, 3, "sum")
    assert 1 < echo["c"] < 5.6
    of_optimisation = {"preset": "opad", "alpha": 0.5}
    echo = service.whole(preferences=SENTENCES[:1], preference_params=of_optimisation)["mavis"]["preference_params"]
    assert echo["c"] == pytest.approx(1.9347, abs=1e-4)


def test_a_preference_of_weight_zero_takes_no_row(service):
    """Without max_tokens an answer gets what the prompts leave of the context, which one that steers would fill."""
    text = choice_of(service.whole(preferences=SENTENCES))["text"]
    long = {"text": "long " * 250, "weight": 0}
    choice = choice_of(service.whole(preferences=[*SENTENCES, long], max_tokens=None, stop=text[9:12]))
    assert choice["text"] == text[:9]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"preferences": [{"text": "  "}]}, "preferences.0.text"),
        ({"preferences": [{"text": "a"}, {"text": "b", "weight": -1}]}, "preferences.1.weight"),
        ({"preferences": [{"text": "a", "weight": 0}]}, "preferences"),
        ({"preferences": [{"text": str(k)} for k in range(4)]}, "preferences"),
        ({"preferences": [{"text": "long " * 700}]}, "preferences"),
        ({"preferences": [{"text": "a"}], "preference_params": {"c": 9}}, "preference_params.c"),
        ({"preference_params": {"preset": "opad", "tau": 0}}, "preference_params.tau"),
        ({"preference_params": {"c": 1, "steps": 3}}, "preference_params.steps"),
    ],
)
def test_preferences_that_cannot_steer_are_refused_by_name(service, fields, param):
    with pytest.raises(ApiError) as refused:
        service.whole(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


# --- several prompts, token ids, echo --------------------------------------------------------------------------------

PROMPTS = ["Once upon a time", "The sky is", "<s>"]
MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # code points that the encoder needs one of


def texts(answer: dict) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def joined(events: list[dict], num_choices: int) -> list[str]:
    found = [""] * num_choices
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["text"]
    return found


@pytest.mark.parametrize("num_deaths", [0, 2])
def test_several_prompts_are_answered_like_each_alone_and_numbered_in_turn(base, loop, service, num_deaths):
    alone = [text for prompt in PROMPTS for text in texts(service.whole(prompt=prompt, n=2))]
    assert len(set(alone)) == 6
    together = Service(base, loop, num_deaths).whole(prompt=PROMPTS, n=2)
    assert texts(together) == alone
    assert together["usage"]["prompt_tokens"] == sum(len(base.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert together["usage"]["completion_tokens"] == 6 * 30
    events = Service(base, loop, num_deaths).events(prompt=PROMPTS, n=2, stream_options={"include_usage": True})
    assert joined(events, 6) == alone
    assert events[-1]["usage"] == together["usage"]
    assert sum(bool(event["choices"] and event["choices"][0]["finish_reason"]) for event in events) == 6


def test_several_prompts_without_a_seed_share_the_one_that_is_drawn(service):
    answer = service.whole(prompt=PROMPTS[:2], seed=None)
    seed = answer["mavis"]["seed"]
    assert texts(answer) == [text for prompt in PROMPTS[:2] for text in texts(service.whole(prompt=prompt, seed=seed))]


def test_a_prompt_of_token_ids_is_the_text_that_they_spell(service, base):
    ids = [base.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    expected = texts(service.whole(prompt=PROMPTS[:2]))
    assert texts(service.whole(prompt=ids)) == expected
    assert texts(service.whole(prompt=ids[0])) == expected[:1]
    assert texts(service.whole(prompt=[PROMPTS[0]])) == expected[:1]


@pytest.mark.parametrize("n", [1, 2])
def test_echo_begins_every_answer_with_its_prompt(service, base, n):
    plain = texts(service.whole(prompt=PROMPTS[:2], n=n))
    expected = [prompt + text for prompt, text in zip([p for p in PROMPTS[:2] for _ in range(n)], plain, strict=True)]
    ids = [base.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    for prompt in (PROMPTS[:2], ids):
        assert texts(service.whole(prompt=prompt, n=n, echo=True)) == expected
        assert joined(service.events(prompt=prompt, n=n, echo=True), 2 * n) == expected
    assert texts(service.whole(prompt=PROMPTS[:2], n=n, echo=False)) == plain


def test_an_answer_continues_the_last_message(service):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello and welc"}]
    fields = {"messages": turns, "continue_final_message": True}
    whole = service.whole(ChatRequest, **fields)
    other = service.whole(ChatRequest, messages=turns)
    assert whole["usage"]["prompt_tokens"] < other["usage"]["prompt_tokens"]
    text = choice_of(whole)["message"]["content"]
    assert text != choice_of(other)["message"]["content"]
    echoed = choice_of(service.whole(ChatRequest, **fields, echo=True))["message"]["content"]
    assert echoed == "Hello and welc" + text
    events = service.events(ChatRequest, **fields, echo=True)
    assert "".join(choice_of(event)["delta"].get("content", "") for event in events) == echoed
    assert choice_of(service.whole(ChatRequest, messages=turns, echo=True)) == choice_of(other)


def test_control_tokens_of_a_text(service):
    def num_tokens(**fields) -> int:
        return service.whole(ChatRequest if "messages" in fields else TextRequest, **fields)["usage"]["prompt_tokens"]

    messages = [{"role": "user", "content": "a</s>"}]
    assert num_tokens(messages=messages) == num_tokens(messages=messages, split_special_tokens=False) + 3
    assert num_tokens(prompt="a</s>") == 2
    assert num_tokens(prompt="a</s>", split_special_tokens=True) == 5
    assert num_tokens(prompt=["a</s>", "b"]) == 3


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ["a"] * 17}, "prompt", "17 prompts with 1 answers each; this server gives at most 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt", "send several requests"),
        ({"prompt": ["a", "x" * 1024]}, "prompt.1", "leaves no room for an answer"),
        ({"prompt": [[5], [6, 102]]}, "prompt.1", "has the token 102; use tokens from 0 to 99"),
        ({"prompt": [10**30]}, "prompt", "use tokens from 0 to 99"),
        ({"prompt": [5], "preferences": [{"text": "Be kind."}]}, "preferences", "give the prompt as text"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(service, fields, param, words):
    with pytest.raises(ApiError, match=words) as refused:
        service.whole(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    is_length = "no room" in words
    assert refused.value.code == ("context_length_exceeded" if is_length else None)  # clients shorten the prompt then


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 400, "prompt": "x" * 900}, "max_tokens"),
        ({"preferences": [{"text": "x" * 1024}]}, "preferences"),
    ],
)
def test_too_many_tokens_have_a_code_of_their_own(service, fields, param):
    with pytest.raises(ApiError) as refused:
        service.whole(**fields)
    assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")


def test_what_the_engine_refuses_keeps_its_code(base):
    """Only the engine knows the size of its cache."""
    small = EngineLoop(Engine(base, max_rows=4, cache_tokens=64))
    with pytest.raises(ApiError, match="leaves room for") as refused:
        Service(base, small).whole(objective_weights=None, max_tokens=100)
    small.stop()
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": MARKS}, "prompt"),
        ({"prompt": ["a", MARKS]}, "prompt.1"),
        ({"preferences": [{"text": "a"}, {"text": MARKS}]}, "preferences.1.text"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_refused_by_name(service, fields, param):
    with pytest.raises(ApiError, match="remove one") as refused:
        service.whole(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_without_a_limit_every_token_is_a_candidate(service):
    whole = texts(service.whole(top_k=2**31 - 1))
    assert texts(service.whole(top_k=-1)) == texts(service.whole(top_k=0)) == whole != texts(service.whole())


# --- tokenizers that drop the first space of a text ------------------------------------------------------------------

SEEDS = range(8)  # answers, about half of which begin with a space
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the sky is"}]


@pytest.fixture(scope="module")
def spaced(base) -> Iterator[Service]:
    spaced = replace(base, tokenizer=make_spaced_tokenizer())
    loop = EngineLoop(Engine(spaced, max_rows=4))
    yield Service(spaced, loop)
    loop.stop()


def words_of(service: Service, body_type: type = TextRequest, **fields) -> str:
    choice = choice_of(service.whole(body_type, **{"objective_weights": None, **fields}))
    return choice["text"] if body_type is TextRequest else choice["message"]["content"]


@pytest.mark.parametrize(
    ("body_type", "fields"),
    [
        (TextRequest, {"prompt": "the sky is"}),
        (TextRequest, {"prompt": make_spaced_tokenizer()("the sky is")["input_ids"]}),
        (ChatRequest, {"messages": TURNS, "continue_final_message": True}),
    ],
)
def test_a_continued_text_keeps_its_first_space(spaced, body_type, fields):
    found = [words_of(spaced, body_type, seed=seed, **fields) for seed in SEEDS]
    assert 0 < sum(text.startswith(" ") for text in found) < len(found)
    for seed, text in zip(SEEDS, found, strict=True):
        asked = {"seed": seed, "objective_weights": None, **fields}
        assert words_of(spaced, body_type, **asked | {"echo": True}) == f"the sky is{text}"
        events = [choice_of(event) for event in spaced.events(body_type, **asked)]
        assert "".join(e["delta"].get("content", "") if body_type is ChatRequest else e["text"] for e in events) == text
        ended = choice_of(spaced.whole(body_type, **asked, stop=text[:2]))
        assert ended["finish_reason"] == "stop"
        assert (ended["text"] if body_type is TextRequest else ended["message"]["content"]) == ""


def test_an_answer_of_its_own_begins_without_a_space(spaced):
    assert not any(words_of(spaced, ChatRequest, seed=seed).startswith(" ") for seed in SEEDS)


@pytest.mark.parametrize(("content", "held"), [("Hello ", "Hello"), (" Hello", "Hello"), ("Hello", "Hello")])
def test_echo_is_what_a_template_leaves_of_a_message(base, loop, content, held):
    trimming = copy.deepcopy(base.tokenizer)
    trimming.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    asked = {"messages": messages, "continue_final_message": True}
    service = Service(replace(base, tokenizer=trimming), loop)
    text = choice_of(service.whole(ChatRequest, **asked))["message"]["content"]
    assert choice_of(service.whole(ChatRequest, **asked, echo=True))["message"]["content"] == held + text


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("no_system", [{"role": "system", "content": "S"}], "System role not supported"),
        ("no_system", [{"role": "user", "content": "a"}] * 2, "Roles must alternate"),
        (
            "drops_system",
            [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}],
            "leaves out the system message",
        ),
        ("broken", [{"role": "user", "content": "a"}], "ZeroDivisionError"),
    ],
)
def test_what_a_template_refuses_is_the_clients_to_change(base, loop, template, messages, words):
    system = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    is_odd = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    alternate = is_odd + "{{ raise_exception('Roles must alternate') }}{% endif %}"
    loops = "{% for m in messages %}", "{{ m['content'] }}{% endfor %}"
    templates = {
        "no_system": (system + alternate).join(loops),
        "drops_system": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        "broken": "{{ 1 / 0 }}",
    }
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = templates[template]
    for is_streamed in (False, True):
        with pytest.raises(ApiError, match=words) as refused:
            Service(replace(base, tokenizer=tokenizer), loop).whole(ChatRequest, messages=messages, stream=is_streamed)
        assert (refused.value.status, refused.value.param) == (400, "messages")
