"""A reward that cannot work is found by a few made-up answers, and named in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mavis_dist import sections
from mavis_dist.rewards.trial import ANSWERS, MORE, try_reward
from mavis_dist.types import UserError
from tests.judge_server import judge_server
from tests.local import listening_nowhere

PROMPTS = ("What is 2 + 2?", "What is 3 + 3?")
MODULE = """
import sys, torch, numpy

def length(prompts, answers): return [float(len(a)) for a in answers]
def lazily(prompts, answers): return (len(a) for a in answers)
def rare(prompts, answers): return [a.count("🍞") for a in answers]
def tensor(prompts, answers): return torch.tensor([len(a) for a in answers])
def raises(prompts, answers): raise RuntimeError("no\\nluck")
def raises_lazily(prompts, answers):
    yield 1.0
    raise RuntimeError("no luck")
def exits(prompts, answers): sys.exit(0)
def empty(prompts, answers): return [1 / len(a.split()) for a in answers]
def long(prompts, answers): return [len(a) if len(a) < 500 else [][0] for a in answers]
def one(answer): return 1.0
def three(prompts, answers, references): return [1.0 for _ in answers]
def keyword(*, prompts, answers): return [1.0 for _ in answers]
def single(prompts, answers): return 1.0
def two(prompts, answers): return [0.0, 1.0]
def column(prompts, answers): return numpy.ones((len(answers), 1))
def constant(prompts, answers): return [3.0 for _ in answers]
def nan(prompts, answers): return [float("nan") for _ in answers]
def huge(prompts, answers): return [10 ** 400 for _ in answers]
def by_answer(prompts, answers): return {a: 1.0 for a in answers}
def a_set(prompts, answers): return {float(len(a)) for a in answers}
async def later(prompts, answers): return [1.0 for _ in answers]
GOLD = {"What is 2 + 2?": "4", "What is 3 + 3?": "6"}
def looked_up(prompts, answers): return [float(GOLD[p] in a) for p, a in zip(prompts, answers)]
def sql(prompts, answers): return [float("SELECT" in a) for a in answers]
class Made:
    def __init__(self, prompts, answers): self.scores = [1.0 * len(a) for a in answers]
    def __iter__(self): return iter(self.scores)
class Scorer:
    def __call__(self, prompts, answers): return [1.0 * len(a) for a in answers]
scorer = Scorer()
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tried_rewards.py").write_text(MODULE)
    (tmp_path / "exiting_rewards.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "torn_rewards.py").write_text("def score(prompts, answers:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tried_rewards", raising=False)


def function(path: str) -> Any:
    return sections.Function(reward="function", path=path)


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, 2) for name in ("length", "lazily", "tensor", "scorer", "looked_up")] + [("rare", 2 + len(MORE))],
)
def test_rewards_that_work_have_a_spread(name: str, count: int) -> None:
    trial = try_reward("mine", function(f"tried_rewards:{name}"), 400, PROMPTS)
    assert len(trial.scores) == count
    assert trial.spread > 0
    assert trial.doubt is None


@pytest.mark.parametrize(("name", "score"), [("sql", "0"), ("constant", "3")])
def test_equal_scores_are_a_doubt_only(name: str, score: str) -> None:
    trial = try_reward("mine", function(f"tried_rewards:{name}"), 400, PROMPTS)
    assert trial.doubt is not None
    assert f"all {2 + len(MORE)} made-up answers have the same score ({score})" in trial.doubt


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("tried_rewards:raises", r"raised RuntimeError \(no luck, tried_rewards.py:8\) for 2 answers"),
        ("tried_rewards:raises_lazily", r"raised RuntimeError \(no luck"),
        ("tried_rewards:exits", "raised SystemExit"),
        ("tried_rewards:empty", r"raised ZeroDivisionError \(.*\) for the answer ''"),
        ("tried_rewards:long", "raised IndexError .* for the answer 'bread bread"),
        ("tried_rewards:one", r"cannot be called as function\(prompts, answers\)"),
        ("tried_rewards:three", r"cannot be called as .*'references'"),
        ("tried_rewards:keyword", "cannot be called as"),
        ("tried_rewards:single", "returned float, not a list of floats"),
        ("tried_rewards:two", "returned 2 scores for 1 answers"),
        ("tried_rewards:column", "must be a finite number"),
        ("tried_rewards:Made", "is a class: name a function or an instance"),
        ("tried_rewards:Scorer", "is a class: name a function or an instance"),
        ("tried_rewards:nan", "returned nan for answer 0"),
        ("tried_rewards:huge", "must be a finite number"),
        ("tried_rewards:by_answer", "returned dict, not a list"),
        ("tried_rewards:a_set", "returned set, not a list"),
        ("tried_rewards:later", "is asynchronous"),
        ("exiting_rewards:score", r"cannot be imported \(SystemExit"),
        ("torn_rewards:score", r"cannot be imported \(SyntaxError"),
    ],
)
def test_rewards_that_cannot_work_are_named(path: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        try_reward("mine", function(path), 400, PROMPTS)
    assert "\n" not in str(refused.value)


def judge(url: str) -> Any:
    return sections.Judge(reward="judge", criterion="Be kind.", url=url, model="m")


def test_a_judge_is_asked_about_two_answers_only() -> None:
    def script(question: str) -> tuple[str, None]:
        return ("9" if ANSWERS[0] in question else "2"), None

    with judge_server(script) as (url, bodies):
        assert try_reward("kind", judge(url), 400, PROMPTS).scores == (9.0, 2.0)
    assert len(bodies) == 2


def test_a_judge_that_does_not_answer_is_named() -> None:
    with judge_server(lambda question: (503, "loading")) as (url, bodies):
        with pytest.raises(UserError, match=r"does not answer .*check url, model and \$OPENAI_API_KEY"):
            try_reward("kind", judge(url), 400, PROMPTS)
        assert len(bodies) <= 2  # none of the long pauses between attempts
    with listening_nowhere() as port:
        pass
    with pytest.raises(UserError, match="does not answer"):
        try_reward("kind", judge(f"http://127.0.0.1:{port}/v1"), 400, PROMPTS)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_named(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"OPENAI_API_KEY.* holds characters that no key has"):
        try_reward("kind", judge("http://127.0.0.1:1/v1"), 400, PROMPTS)
