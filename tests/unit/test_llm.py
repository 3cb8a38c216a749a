"""A finished run in Python: it answers as its HTTP service does, and says in one sentence what it cannot use."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

import mavis_dist
from benchmarks.common.http_load import client_process
from mavis_dist import LLM
from mavis_dist.decode import PRESETS, RequestError
from mavis_dist.types import UserError
from tests.same_answers import differences
from tests.tiny import MODEL

QUESTION = "How do I make good coffee?"
WEIGHTS = {"positive": 0.7, "brief": 0.3}


@pytest.fixture(scope="module")
def llm(finished_run: Path) -> LLM:
    return LLM.from_run(finished_run)


def served(url: str, run: Path, **body: object) -> dict:
    body = {"model": str(run.parents[1] / MODEL), "messages": [{"role": "user", "content": QUESTION}], **body}
    return httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60).raise_for_status().json()


# --- the same as over HTTP -------------------------------------------------------------------------------------------


def test_random_weights_give_the_same_answers_over_http(llm, finished_run, run_url):
    """With 1,000 pairs there is no difference either; that takes half a minute."""
    model = str(finished_run.parents[1] / MODEL)
    with client_process() as process:
        assert differences(llm, run_url, model, process, num_pairs=150, max_tokens=6) == []


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, {}),
        ({"objective_weights": WEIGHTS}, {"weights": WEIGHTS}),
        ({"objective_weights": WEIGHTS, "temperature": 0.0}, {"weights": WEIGHTS, "temperature": 0.0}),
        (
            {"objective_weights": WEIGHTS, "beta": 1.0, "tilt_cap": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
            {"weights": WEIGHTS, "beta": 1.0, "tilt_cap": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        ),
        (
            {"preferences": [{"text": "Be odd.", "weight": 2}, {"text": "Be kind."}], "objective_weights": WEIGHTS},
            {"preferences": {"Be odd.": 2, "Be kind.": 1}, "weights": WEIGHTS},
        ),
        (
            {"preferences": [{"text": "Be odd."}], "preference_params": {"preset": "anchor"}},
            {"preferences": "Be odd.", "preference_params": PRESETS["anchor"]},
        ),
        ({"stop": "w", "max_tokens": 30}, {"stop": "w", "max_tokens": 30}),
        ({"scorer": "full", "objective_weights": {"brief": 1}}, {"scorer": "full", "weights": {"brief": 1}}),
    ],
)
def test_options_and_defaults_are_those_of_the_service(llm, finished_run, run_url, body, options):
    response = served(run_url, finished_run, seed=5, **body)
    [choice], answer = response["choices"], llm.chat(QUESTION, seed=5, **options)
    assert answer.text == choice["message"]["content"]
    assert (answer.finish_reason, answer.seed) == (choice["finish_reason"], response["mavis"]["seed"])
    assert len(answer.choice.tokens) == response["usage"]["completion_tokens"]
    assert answer.divergence == pytest.approx(choice["mavis"]["divergence"], abs=1e-5)
    assert answer.values == pytest.approx(choice["mavis"]["values"], abs=1e-5)


def test_several_answers_and_a_conversation_are_those_of_the_service(llm, finished_run, run_url):
    messages = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": QUESTION}]
    response = served(run_url, finished_run, messages=messages, seed=3, n=3, objective_weights=WEIGHTS, max_tokens=12)
    for question, options in ((messages, {}), (QUESTION, {"system": "Be odd."})):
        [answers] = llm.batch([question], WEIGHTS, n=3, seed=3, max_tokens=12, **options)
        assert [a.text for a in answers] == [choice["message"]["content"] for choice in response["choices"]]
    assert len({answer.text for answer in answers}) == 3


# --- by itself -------------------------------------------------------------------------------------------------------


def test_a_run_knows_its_objectives_and_steers_by_them(llm):
    assert llm.objectives == ("brief", "positive")
    base, steered = llm.chat(QUESTION, seed=1), llm.chat(QUESTION, WEIGHTS, seed=1)
    assert base.text != steered.text
    assert (base.divergence, base.values) == (0.0, {})
    assert steered.divergence > 0
    assert steered.values.keys() == WEIGHTS.keys()
    assert llm.chat(QUESTION, WEIGHTS, beta=0, seed=1).text == base.text


def test_a_seed_that_is_drawn_repeats_the_answer(llm):
    first, second = llm.chat(QUESTION, WEIGHTS), llm.chat(QUESTION, WEIGHTS)
    assert first.seed != second.seed
    assert llm.chat(QUESTION, WEIGHTS, seed=first.seed).text == first.text


def test_questions_of_a_batch_are_answered_as_if_alone(llm):
    questions = ["Why?", "How do I get there?", QUESTION]
    batch = llm.batch(questions, WEIGHTS, seed=2, max_tokens=10)
    assert [a.text for [a] in batch] == [llm.chat(q, WEIGHTS, seed=2, max_tokens=10).text for q in questions]
    requests = [llm.request(QUESTION, {"brief": w, "positive": 1}, seed=2, max_tokens=10) for w in (0.0, 5.0)]
    [[plain], [brief]] = llm.generate(requests)
    assert plain.text != brief.text


def test_a_stream_is_the_answer_in_pieces(llm):
    stream = llm.stream(QUESTION, WEIGHTS, seed=1)
    first = next(stream)
    with pytest.raises(UserError, match="not finished"):
        _ = stream.answer
    pieces = [first, *stream]
    whole = llm.chat(QUESTION, WEIGHTS, seed=1)
    assert len(pieces) > 5
    assert "".join(pieces) == whole.text
    assert stream.answer.text == whole.text
    assert stream.answer.divergence == pytest.approx(whole.divergence)


def test_a_stream_that_was_left_is_in_nobodys_way(llm):
    for _ in llm.stream(QUESTION):
        break
    kept = llm.stream(QUESTION)
    next(kept)
    for ask in (llm.chat, lambda question: next(llm.stream(question))):
        with pytest.raises(UserError, match=r"another answer is being streamed.*close\(\)"):
            ask(QUESTION)
    kept.close()
    assert llm.chat(QUESTION, max_tokens=2).text
    with pytest.raises(UserError, match="not finished"):
        _ = kept.answer


def test_an_interrupted_answer_is_in_nobodys_way(llm, monkeypatch):
    def interrupted(requests):
        llm._engine.submit(requests[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.chat(QUESTION)
    assert llm.chat(QUESTION, max_tokens=2).text


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"weights": {"fame": 1}}, "objective_weights: there is no objective 'fame'; available: brief, positive"),
        ({"weights": {"brief": -1}}, "the weight of 'brief' is -1"),
        ({"beta": -1}, "beta: is -1"),
        ({"max_tokens": 5000}, "max_tokens: is 5000"),
        ({"preferences": [" "]}, r"preferences\.0\.text"),
        ({"preferences": ["Be odd."] * 20}, "preferences: 20 given; at most 15 fit"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_decoded(llm, asked, message):
    for ask in (llm.chat, llm.stream):
        with pytest.raises(RequestError, match=message):
            ask(QUESTION, **asked)


def test_a_misspelt_option_is_an_error(llm):
    with pytest.raises(TypeError, match="betta"):
        llm.chat(QUESTION, betta=1)


def test_a_folder_that_is_not_a_finished_run_is_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a finished run, it has no run\.yaml"):
        LLM.from_run(tmp_path / "nowhere")
    shutil.copy(finished_run / "run.yaml", tmp_path)
    with pytest.raises(UserError, match="has published no value model"):
        LLM.from_run(tmp_path)
    for text in ("run: [", "run: x\n", "[]"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=r"run\.yaml cannot be used"):
            LLM.from_run(tmp_path)


def test_a_run_may_be_moved_and_named_in_any_way(llm, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    expected = llm.chat(QUESTION, WEIGHTS, seed=1, max_tokens=4).text
    for place in (".", "../moved/", f"file://{tmp_path}/moved"):
        assert LLM.from_run(place).chat(QUESTION, WEIGHTS, seed=1, max_tokens=4).text == expected


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'LML'"):
        _ = mavis_dist.LML
