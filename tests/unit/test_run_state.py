"""What stages of a run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mavis_dist import run_state
from mavis_dist.config import parse
from mavis_dist.plan import Node
from mavis_dist.run_state import SCORED_TOGETHER, RunState, score

REWARDS = {
    "by_neighbours": {"reward": "function", "path": "tests.unit.test_run_state:place_among"},
    "by_length": {"reward": "function", "path": "tests.unit.test_run_state:length_of"},
    "brief": {"reward": "brevity"},
}
STATE = cast(RunState, SimpleNamespace(config=parse({"run": "r", "objectives": REWARDS})))


def place_among(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """A reward that depends on what is scored with an answer, as padding makes one do by rounding."""
    return [float(len(answers) * 1000 + place) for place in range(len(answers))]


def length_of(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(len(prompt) * 1000 + len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture
def num_tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks every call had, which run here."""
    found: list[int] = []

    def map_here(
        function: Callable[..., Any], items: Sequence[tuple[Any, ...]], stage: str, unit: str, are_actors_idle: bool
    ) -> list[Any]:
        assert are_actors_idle
        found.append(len(items))
        return [function(*item) for item in items]

    monkeypatch.setattr(run_state, "map_tasks", map_here)
    return found


@pytest.mark.parametrize("num_answers", [1, SCORED_TOGETHER, 5 * SCORED_TOGETHER + 7])
def test_scores_do_not_depend_on_the_machines(
    num_answers: int, num_tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [("question", "a " * number) for number in range(num_answers)]
    pairs = dict.fromkeys(REWARDS, some)
    found = []
    for machines in ([Node(1)], [Node(2), Node(2)], [Node(64)] * 3):
        monkeypatch.setattr("mavis_dist.cluster.nodes", lambda machines=machines: machines)
        found.append(score(STATE, "gate i1", pairs))
    assert found[0] == found[1] == found[2]
    assert found[0]["by_length"] == length_of(*zip(*some, strict=True))
    assert found[0]["brief"] == [-float(number) for number in range(num_answers)]
    num_parts = -(-num_answers // SCORED_TOGETHER)
    assert num_tasks == [2, min(2 * num_parts, 4), 2 * num_parts]


def test_nothing_is_started_for_text_rules_or_without_answers(num_tasks: list[int]) -> None:
    assert score(STATE, "limit", {"brief": [("question", "one two")]}) == {"brief": [-2.0]}
    assert score(STATE, "limit", {"by_length": [], "brief": []}) == {"by_length": [], "brief": []}
    assert num_tasks == []
