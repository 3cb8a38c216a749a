"""Verdicts of a judge: both orders, ties counted, asked once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mavis_dist import config
from mavis_dist.compare.figures import summarise
from mavis_dist.compare.judged import (
    LOST,
    TIED,
    UNREADABLE,
    WON,
    both_orders,
    check_judge,
    judge,
    outcome,
    summary,
)
from mavis_dist.compare.measured import Measured
from mavis_dist.compare.results import TrainingCost
from mavis_dist.compare.workspace import Workspace
from mavis_dist.rewards import RewardError
from mavis_dist.types import Prompt
from tests.judge_server import judge_server
from tests.unit.compare.made_up import NUM_PROMPTS, VECTORS, made_up

PROMPTS = [Prompt(f"p{number}", f"question {number}?") for number in range(NUM_PROMPTS)]
JUDGED = 3  # prompts
GOOD = "a good answer"


def make_workspace(folder: Path, url: str) -> Workspace:
    objective = {"reward": "sentiment"}
    spec = {
        "run": "run",
        "storage": str(folder),
        "objectives": {"a": objective, "b": objective},
        "compare": {"judge": {"url": url, "model": "wise", "prompts": JUDGED}},
    }
    return Workspace(config.parse(spec))


def measured_with(texts: dict[str, str]) -> Measured:
    """The made-up answers, of some methods with other texts."""
    measured = made_up()
    cells = {
        cell: dataclasses.replace(answers, text=[texts.get(cell.method, "an answer")] * NUM_PROMPTS)
        for cell, answers in measured.cells.items()
    }
    return dataclasses.replace(measured, cells=cells)


def prefers_good(question: str) -> tuple[str, None]:
    first, second = question.split("Answer A:\n")[1].split("Wishes:")[0].split("Answer B:\n")
    if (GOOD in first) == (GOOD in second):
        return "C", None
    return ("A" if GOOD in first else "B"), None


def test_a_win_needs_both_orders() -> None:
    first, second, equal = {"A": 0.8, "B": 0.2}, {"A": 0.1, "B": 0.9}, {"C": 0.6, "A": 0.4}
    assert outcome(first, second) == WON
    assert outcome(second, first) == LOST
    assert outcome(first, first) == outcome(second, second) == outcome(equal, second) == outcome(equal, equal) == TIED
    assert outcome({}, second) == outcome(first, {}) == UNREADABLE


def test_ties_and_pairs_without_a_verdict_count_half() -> None:
    found = summary([[WON, TIED, LOST, WON], [WON, LOST, UNREADABLE, WON]])
    assert (found.won, found.tied, found.lost, found.unreadable) == (4, 1, 2, 1)
    assert found.preferred.mean == pytest.approx((4 + 2 * 0.5) / 8)
    assert found.preferred.low < found.preferred.mean < found.preferred.high


def test_every_pair_is_asked_about_in_both_orders() -> None:
    one, other = both_orders(["why?"], ["ours"], ["theirs"], "Be brief.")
    assert one.index("ours") < one.index("theirs")
    assert other.index("theirs") < other.index("ours")
    assert all("why?" in text and "Be brief." in text for text in (one, other))


def test_methods_are_judged_against_the_reference(tmp_path: Path) -> None:
    measured = measured_with({"weak": GOOD})
    with judge_server(prefers_good) as (url, bodies):
        workspace = make_workspace(tmp_path, url)
        settings = workspace.config.compare.judge
        assert settings is not None
        check_judge(settings, workspace)
        found = judge(settings, workspace, measured, PROMPTS, "mavis")
        asked = len(bodies)
        again = judge(settings, workspace, measured, PROMPTS, "mavis")
        assert len(bodies) == asked, "verdicts are stored"
    assert again == found
    pairs = len(VECTORS) * JUDGED
    assert set(found) == set(measured.methods) - {"mavis"}
    assert (found["weak"].won, found["weak"].preferred.mean) == (pairs, 1.0)
    assert (found["short"].tied, found["short"].preferred.mean) == (pairs, 0.5)
    assert asked == 1 + 2 * pairs * len(found)
    comparison = summarise(measured, dict.fromkeys(measured.methods, TrainingCost()), {}, found)
    rows = {row.method: row.judged for row in comparison.methods}
    assert rows["weak"] == found["weak"]
    assert rows["mavis"] is None
    assert json.loads(json.dumps(comparison.to_json()))["judged"]["weak"]["won"] == pairs


def test_a_judge_that_favours_a_place_decides_nothing(tmp_path: Path) -> None:
    with judge_server(lambda _: ("A", None)) as (url, _):
        workspace = make_workspace(tmp_path, url)
        assert workspace.config.compare.judge is not None
        found = judge(workspace.config.compare.judge, workspace, measured_with({"weak": GOOD}), PROMPTS, "mavis")
    assert all(one.preferred.mean == 0.5 and one.won == one.lost == 0 for one in found.values())


def test_verdicts_survive_a_judge_that_stops_answering(tmp_path: Path) -> None:
    measured, limit = measured_with({}), 2 * JUDGED + 1

    def script(_: str) -> tuple[str, None] | tuple[int, str]:
        return ("C", None) if len(bodies) <= limit else (403, "quota used up")

    with judge_server(script) as (url, bodies):
        workspace = make_workspace(tmp_path, url)
        settings = workspace.config.compare.judge
        assert settings is not None
        with pytest.raises(RewardError, match="quota used up"):
            judge(settings, workspace, measured, PROMPTS, "mavis")
        kept, limit = len(bodies), 10**6
        judge(settings, workspace, measured, PROMPTS, "mavis")
        pairs = len(VECTORS) * JUDGED * (len(measured.methods) - 1)
        assert len(bodies) - kept == 2 * (pairs - JUDGED), "those of the first weights are stored"
