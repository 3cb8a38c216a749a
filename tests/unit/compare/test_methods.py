"""Methods on a tiny model: what each of them promises, and that wrong settings are refused before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mavis_dist.compare.method import BASE, DEFAULT, Answer, Method, make_methods
from mavis_dist.compare.prompted import Mato, wishes
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.decode import PRESETS
from mavis_dist.evaluate.collect import record_stage
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, UserError
from tests import tiny

NAMES = ("first", "second")
PROMPTS = [Prompt(f"p{i}", f"question {i}?") for i in range(4)]
HALVES = {"first": 0.5, "second": 0.5}
PREFERENCES = {"first": "Use many vowels.", "second": "Be brief."}


class Echo(Method):
    """Answers with the question: a method of a user's own."""

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        return [Answer(prompt.text, 1, None, 1) for prompt in prompts]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_models(folder, "run", NAMES)
    return Config(
        run="run",
        storage=str(folder / "runs"),
        objectives={
            "first": {"reward": "function", "path": "tests.tiny:count_vowels"},
            "second": {"reward": "brevity"},
        },
        base={"model": str(folder / tiny.MODEL), "dtype": "float32"},
        rollout={"max_tokens": 12, "cpus_per_actor": 1},
        compare={"preferences": PREFERENCES},
    )


@pytest.fixture(scope="module")
def workspace(config: Config) -> Workspace:
    return Workspace(config)


def make(workspace: Workspace, name: str, **settings: Any) -> Method:
    compare = workspace.config.compare.model_copy(update={"methods": {name: settings}})
    return make_methods(compare, workspace)[name]


def rewards(workspace: Workspace, answers: list[Answer], weights: Mapping[str, float]) -> np.ndarray:
    texts = [answer.text for answer in answers]
    return np.sum([w * np.array(workspace.score(name, PROMPTS, texts)) for name, w in weights.items()], axis=0)


@pytest.mark.parametrize("name", [*DEFAULT, "mavis_full"])
def test_the_same_arguments_give_the_same_answers(config: Config, workspace: Workspace, name: str) -> None:
    method = make(workspace, name)
    strength = method.strengths[0]
    weights = HALVES if method.is_steered else {}
    found = method.answer(PROMPTS, weights, strength, 3)
    again = make(Workspace(config), name).answer(PROMPTS, weights, strength, 3)
    assert [answer.text for answer in found] == [answer.text for answer in again]
    assert [answer.text for answer in found] != [a.text for a in method.answer(PROMPTS, weights, strength, 4)]
    for answer in found:
        assert answer.generated >= answer.num_tokens > 0
        assert answer.divergence is not None
        assert math.isfinite(answer.divergence)
        assert answer.seconds > 0


def test_the_best_of_n_is_the_best_of_the_same_n_answers(workspace: Workspace) -> None:
    method = make(workspace, "best_of_n", strengths=[2, 4, 8])
    drawn = workspace.draw(PROMPTS, 8, 0)
    by_n = {n: method.answer(PROMPTS, HALVES, n, 0) for n in (2, 4, 8)}
    for n, answers in by_n.items():
        rows = [row[:n] for row in drawn.choices]
        best_P = workspace.weighted(PROMPTS, rows, HALVES).max(axis=1)  # the scales are 0 and 1
        assert rewards(workspace, answers, HALVES) == pytest.approx(best_P)
        for answer, row in zip(answers, rows, strict=True):
            assert answer.generated == sum(len(choice.tokens) for choice in row)
            assert answer.reward_calls == n * 2
            assert answer.divergence == pytest.approx(math.log(n) - (n - 1) / n)
    assert (rewards(workspace, by_n[8], HALVES) >= rewards(workspace, by_n[2], HALVES)).all()


def test_the_best_by_value_has_the_largest_value_of_its_last_token(workspace: Workspace) -> None:
    """Against a guided pass over the whole answers that changes none of their tokens."""
    method = make(workspace, "best_of_n_value", strengths=[2, 4])
    requests = workspace.requests(PROMPTS, 0, 4, weights=HALVES, beta=1e-9)
    guided = workspace.generate(requests, method.folders())  # type: ignore[attr-defined]
    weights = {"first": 0.25, "second": 0.75}
    answers = method.answer(PROMPTS, weights, 4, 0)
    for answer, row in zip(answers, guided.choices, strict=True):
        values = [sum(w * choice.values[name][-1] for name, w in weights.items()) for choice in row]
        assert answer.text == row[int(np.argmax(values))].text
        assert answer.reward_calls == 0


def test_resampling_without_strength_is_uniform_and_with_much_the_best(workspace: Workspace) -> None:
    method = make(workspace, "sir", n=4)
    prompts = [Prompt(f"q{i}", "the same?") for i in range(400)]
    drawn = workspace.draw(prompts, 4, 0)
    uniform = method.answer(prompts, HALVES, 1e-12, 0)
    picks = [
        [choice.text for choice in row].index(answer.text) for row, answer in zip(drawn.choices, uniform, strict=True)
    ]
    counts = np.bincount(picks, minlength=4)
    assert abs(counts - 100).max() < 4 * math.sqrt(400 * 0.25 * 0.75)
    assert all(answer.divergence == pytest.approx(0, abs=1e-9) for answer in uniform)
    best = method.answer(PROMPTS, HALVES, 1e6, 0)
    best_P = workspace.weighted(PROMPTS, [row[:4] for row in workspace.draw(PROMPTS, 4, 0).choices], HALVES).max(1)
    assert rewards(workspace, best, HALVES) == pytest.approx(best_P)


def test_scorers_differ_in_speed_only_and_a_vanishing_tilt_is_the_base_model(workspace: Workspace) -> None:
    base = make(workspace, BASE).answer(PROMPTS, {}, 0.0, 1)
    lazy, full = make(workspace, "mavis"), make(workspace, "mavis_full")
    assert [a.text for a in lazy.answer(PROMPTS, HALVES, 1e-9, 1)] == [a.text for a in base]
    strong = full.answer(PROMPTS, HALVES, 4.0, 1)
    assert [a.text for a in lazy.answer(PROMPTS, HALVES, 4.0, 1)] == [a.text for a in strong] != [a.text for a in base]
    assert all(answer.divergence and answer.divergence > 0 for answer in strong)


def test_a_distilled_model_steers_where_it_is_asked_for(tmp_path: Path, config: Config, workspace: Workspace) -> None:
    """Students need it; other scorers keep the published iterations by default."""
    tiny.write_models(tmp_path, "run", NAMES)
    tiny.publish_distilled(tmp_path, "run", NAMES, "5fa0")
    distilled = Workspace(config.model_copy(update={"storage": str(tmp_path / "runs")}))
    lazy, full, own = (
        make(distilled, "mavis", distilled=True),
        make(distilled, "mavis_full", distilled=True),
        make(distilled, "mavis"),
    )

    def texts(method: Method) -> list[str]:
        return [answer.text for answer in method.answer(PROMPTS, HALVES, 4.0, 1)]

    assert texts(lazy) == texts(full) != texts(own) == texts(make(workspace, "mavis"))
    assert lazy.inputs() != own.inputs()
    for name in ("mavis_predicted", "mavis_qhead"):
        assert make(distilled, name).inputs() == lazy.inputs()
        assert texts(make(distilled, name)) != texts(own)
    store, extended = Store(str(tmp_path / "runs"), "run"), layout.distilled_folder("5fa0")
    tiny.publish_distilled(tmp_path, "run", NAMES, "71bc", parent=extended)
    record_stage(store, extended, 5.0, "")
    record_stage(store, layout.distilled_folder("71bc"), 2.0, "")
    assert lazy.training().seconds == own.training().seconds + 7


def test_best_of_two_steered_answers_takes_the_better(workspace: Workspace) -> None:
    method = make(workspace, "mavis_best_of_2")
    requests = workspace.requests(PROMPTS, 0, 2, weights=HALVES, beta=2.0)
    both = workspace.generate(requests, method.folders())  # type: ignore[attr-defined]
    answers = method.answer(PROMPTS, HALVES, 2.0, 0)
    assert rewards(workspace, answers, HALVES) == pytest.approx(
        workspace.weighted(PROMPTS, both.choices, HALVES).max(1)
    )


def test_a_prompt_states_preferences_in_the_order_of_their_importance(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = wishes(workspace, {"first": 0.25, "second": 0.75})
    assert text == "Be brief. (importance: 75 %)\nUse many vowels. (importance: 25 %)"
    assert wishes(workspace, {"first": 1.0}) == "Use many vowels."
    method = make(workspace, "prompt")
    asked: list[str] = []
    monkeypatch.setattr(method, "generate", lambda requests: asked.append(str(requests[0].preferences[0].prompt)))
    for strength in method.strengths:
        method.answer(PROMPTS, HALVES, strength, 0)
    assert len(set(asked)) == 4


def test_a_prompted_answer_is_the_one_that_the_prompt_alone_gives(workspace: Workspace) -> None:
    """The row of the plain prompt measures the divergence and changes nothing."""
    method = make(workspace, "prompt")
    text = wishes(workspace, HALVES)
    prompted = [
        request.__class__(
            id=request.id,
            prompt=workspace.base.chat(prompt.text, f"{workspace.config.base.system}\n{text}"),
            params=request.params,
        )
        for prompt, request in zip(PROMPTS, workspace.requests(PROMPTS, 0), strict=True)
    ]
    plain = [choice.text for (choice,) in workspace.generate(prompted, {}).choices]
    assert [answer.text for answer in method.answer(PROMPTS, HALVES, 1, 0)] == plain


@pytest.mark.parametrize("preset", ["mato", "linear_alignment", "context_steering", "amulet"])
def test_relatives_of_mato_differ_from_it_in_their_presets(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Mato, "generate", lambda _, requests: asked.extend(requests))
    make(workspace, preset).answer(PROMPTS, HALVES, 2.0, 0)
    make(workspace, "own", method="mato", preset=preset).answer(PROMPTS, HALVES, 2.0, 0)
    assert len(asked) == 2 * len(PROMPTS)
    assert all(request.preference_params == replace(PRESETS[preset], c=2.0) for request in asked)


def test_a_method_of_a_users_own(workspace: Workspace) -> None:
    method = make(workspace, "mine", method=f"{__name__}:Echo", strengths=[0.5])
    assert method.strengths == (0.5,)
    assert method.answer(PROMPTS, HALVES, 0.5, 0)[1].text == "question 1?"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("mavs", {}, ["'compare.methods.mavs'", "mavis_best_of_2", "module:Class"]),
        ("mine", {"method": "no.such:Thing"}, ["'compare.methods.mine.method'", "no.such:Thing", "PYTHONPATH"]),
        ("mine", {"method": "tests.tiny:count_vowels"}, ["'compare.methods.mine.method'", "subclass"]),
        ("mavis", {"scorrer": "full"}, ["'compare.methods.mavis.scorrer'", "scorer"]),
        ("mavis", {"scorer": "fast"}, ["compare.methods.mavis", "'fast'", "lazy"]),
        ("mavis", {"scorer": "qhead"}, ["compare.methods.mavis", "jobs.distill"]),
        ("mavis", {"run": "nowhere"}, ["'nowhere'", "finish it first"]),
        ("mavis", {"n": 0}, ["n is 0", "from 1 to"]),
        ("mavis", {"strengths": [2, 1]}, ["'compare.methods.mavis.strengths'", "[2, 1]", "ascending"]),
        ("mavis", {"strengths": "2"}, ["'compare.methods.mavis.strengths'", "'2'"]),
        ("best_of_n", {"strengths": [1, 2]}, ["compare.methods.best_of_n", "strengths has 1", "from 2 to"]),
        ("sir", {"n": 2.5}, ["compare.methods.sir", "2.5"]),
        ("mato", {"strengths": [9]}, ["compare.methods.mato", "9", "up to 8"]),
        ("mato", {"preset": "matto"}, ["compare.methods.mato", "'matto'", "amulet"]),
        ("prompt", {"strengths": [5]}, ["compare.methods.prompt", "1, 2, 3, 4"]),
    ],
)
def test_wrong_settings_are_refused(
    workspace: Workspace, name: str, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        make(workspace, name, **settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_preference_that_is_not_known_is_asked_for(config: Config) -> None:
    bare = config.model_copy(update={"compare": config.compare.model_copy(update={"preferences": {}})})
    with pytest.raises(UserError, match=r"'first' has no preference: give compare\.preferences\.first="):
        make(Workspace(bare), "mato")
