"""The plain reference and the exact replay of the decode benchmark have the engine's token distribution."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks.decode import __main__ as decode
from benchmarks.decode import naive, qhead_quality, residual_cap, step_time, tilt_cap
from benchmarks.decode.step_time import Stopwatch
from benchmarks.rollout import __main__ as rollout
from benchmarks.training import __main__ as training
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer, scorer
from tests.fakes import tiny_base, tiny_student, tiny_value

BASE = tiny_base(seed=1, eos_boost=1.0)  # some answers end, some are cut
MODELS = {"a": tiny_value(1), "b": tiny_value(2)}
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12), (13,), (14, 15)]


def requests(temperature: float, cap: float | None = None) -> list[Request]:
    params = [SamplingParams(max_tokens=24, temperature=temperature, seed=i) for i in range(len(PROMPTS))]
    return [
        Request(str(i), prompt, {"a": 0.25, "b": 0.75}, 4.0, cap, params[i], scorer=Scorer.FULL)
        for i, prompt in enumerate(PROMPTS)
    ]


def test_the_plain_reference_is_the_full_scorer() -> None:
    ours = [choices[0].tokens for choices in Engine(BASE, LocalGuide(MODELS)).generate(requests(0.0))]
    unsteered = [Request(r.id, r.prompt, params=r.params) for r in requests(0.0)]
    plain = [choices[0].tokens for choices in Engine(BASE).generate(unsteered)]
    assert [naive.answer(BASE, MODELS, request) for request in requests(0.0)] == ours
    assert ours != plain, "the values have an effect"


@pytest.mark.parametrize("cap", [0.5, float("inf")])
def test_the_replay_has_the_distribution_of_the_engine(cap: float) -> None:
    """log pi(a) - log pi_ref(a) of every generated token."""
    tilted = requests(1.0, None if cap == float("inf") else cap)
    answers = Engine(BASE, LocalGuide(MODELS)).generate(tilted)
    for request, [choice] in zip(tilted, answers, strict=True):
        steps = tilt_cap.replay(BASE, MODELS, request, choice.tokens)
        is_chosen_TK = steps.ids_TK == torch.tensor(choice.tokens)[:, None]
        logratios = (steps.distribution(cap).log() - steps.logprobs_TK)[is_chosen_TK]
        assert logratios.tolist() == pytest.approx(choice.logratios, abs=1e-4)


def test_the_replay_of_a_student_has_the_distribution_of_the_engine() -> None:
    """log pi(a) - log pi_ref(a) of every token generated with a student's predictions."""
    student = tiny_student(3, num_objectives=2)
    students = {"a": (student, 1), "b": (student, 0)}
    tilted = [replace(request, scorer=Scorer.QHEAD) for request in requests(1.0, 0.5)]
    answers = Engine(BASE, LocalGuide(MODELS, students)).generate(tilted)
    for request, [choice] in zip(tilted, answers, strict=True):
        exact = tilt_cap.replay(BASE, MODELS, request, choice.tokens)
        steps = qhead_quality.predict(students, request, choice.tokens, exact)
        is_chosen_TK = steps.ids_TK == torch.tensor(choice.tokens)[:, None]
        logratios = (steps.distribution(0.5).log() - steps.logprobs_TK)[is_chosen_TK]
        assert logratios.tolist() == pytest.approx(choice.logratios, abs=1e-4)


def test_the_replay_of_checked_predictions_has_the_distribution_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """log pi(a) - log pi_ref(a) of every token generated with both caps, from all candidates."""
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", 40)
    monkeypatch.setattr(scorer, "SLACK", float("inf"))
    student = tiny_student(3, num_objectives=2)
    students = {"a": (student, 1), "b": (student, 0)}
    own = {name: student.model.only(head) for name, (student, head) in students.items()}
    tilted = [replace(r, scorer=Scorer.PREDICTED, residual_cap=0.3) for r in requests(1.0, 0.5)]
    answers = Engine(BASE, LocalGuide(MODELS, students)).generate(tilted)
    for request, [choice] in zip(tilted, answers, strict=True):
        exact = tilt_cap.replay(BASE, own, request, choice.tokens)
        steps = qhead_quality.predict(students, request, choice.tokens, exact)
        is_chosen_TK = steps.ids_TK == torch.tensor(choice.tokens)[:, None]
        probs_TK = residual_cap.distribution(exact, qhead_quality.uncapped(steps), 0.5, 0.3)
        logratios = (probs_TK.log() - steps.logprobs_TK)[is_chosen_TK]
        assert logratios.tolist() == pytest.approx(choice.logratios, abs=1e-4)


def test_the_time_of_a_nested_part_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 5.0, 7.0])  # outer starts, inner starts, inner ends, outer ends
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    inner = watch.timed("inner", lambda: None)
    watch.timed("outer", inner)()
    assert (watch.seconds["outer"], watch.seconds["inner"]) == (3.0, 4.0)


@pytest.mark.parametrize("benchmark", [decode, training, rollout])
def test_a_missing_run_is_reported_in_one_line(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--run", "runs/no-such-run"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: runs/no-such-run is not a finished run with two objectives: run `make quickstart` first\n"
    )
