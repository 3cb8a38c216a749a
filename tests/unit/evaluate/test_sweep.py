"""The sweep's shares of the limit: of corners and mixtures, as text, and in files without any."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mavis_dist.core import limit
from mavis_dist.decode import Choice, SamplingParams
from mavis_dist.evaluate import sweep as sweeping
from mavis_dist.evaluate.sweep import Estimate, Point, Sweep, grid, share_text, summarise, sweep_from_json, table
from mavis_dist.types import Prompt, RewardScale

SCALES = {"good": RewardScale(2.0, 0.5), "short": RewardScale(-30.0, 8.0)}
NUM_PROMPTS = 10
PROMPTS = [Prompt(f"p{index}", f"question {index}?") for index in range(NUM_PROMPTS)]
POINTS = grid(list(SCALES), 3)
DIVERGENCES = {"base": 0.0, "good": 0.8, "short": 0.3, "0.5 good + 0.5 short": 0.4}


def measured(divergences: dict[str, float], num_answers: int = 16, num_prompts: int = NUM_PROMPTS) -> Sweep:
    """Two answers of every point to every prompt, and `num_answers` of the base model."""
    rng = np.random.default_rng(0)
    answers = {
        point.name: [
            [(Choice(n, divergences=[divergences[point.name] / 2] * 2), "text") for n in range(2)]
            for _ in range(num_prompts)
        ]
        for point in POINTS
    }
    scores = {
        point.name: {
            name: list(scale.mean + scale.sd * (point.weights.get(name, 0.0) + 0.1 * rng.normal(size=2 * num_prompts)))
            for name, scale in SCALES.items()
        }
        for point in POINTS
    }
    base_scores = {
        name: (scale.mean + scale.sd * rng.normal(size=(num_prompts, num_answers))).tolist()
        for name, scale in SCALES.items()
        if num_answers
    }
    return summarise(POINTS, answers, scores, SCALES, PROMPTS[:num_prompts], 6.0, base_scores)


def shares(sweep: Sweep) -> dict[str, Estimate | None]:
    return {point.name: point.share for point in sweep.points}


def test_a_share_is_the_gain_shown_over_the_limit_drawn() -> None:
    sweep = measured(DIVERGENCES)
    for point in sweep.points[1:3]:
        curve = sweep.limits[point.name]
        limit_there = np.interp(math.sqrt(point.divergence), np.sqrt(curve.divergence), curve.gain)
        assert point.share is not None
        assert point.share.mean == pytest.approx(point.gain[point.name].mean / limit_there, rel=1e-3)
        assert point.share.low < point.share.mean < point.share.high
    assert sweep.limit_answers == 16
    assert sweep.points[0].share is None


def test_a_mixture_is_compared_with_the_limit_of_the_mixed_reward() -> None:
    """In standard deviations: independent rewards mix to a spread of sqrt(1/2), not 1."""
    sweep = measured(DIVERGENCES, num_answers=400)
    mixture = sweep.points[-1]
    gain = 0.5 * mixture.gain["good"].mean + 0.5 * mixture.gain["short"].mean
    assert mixture.share is not None
    assert mixture.share.mean == pytest.approx(gain / (math.sqrt(0.5) * math.sqrt(2 * 0.4)), rel=0.03)


def test_the_weights_of_a_mixture_are_normalised_as_those_of_a_request() -> None:
    rng = np.random.default_rng(0)
    gain_P = {name: 0.3 + 0.1 * rng.normal(size=NUM_PROMPTS) for name in SCALES}
    base_PN = {name: rng.normal(size=(NUM_PROMPTS, 16)) for name in SCALES}
    found = [
        sweeping._share(Point("mixture", weights), gain_P, np.full(NUM_PROMPTS, 0.5), base_PN)
        for weights in ({"good": 0.75, "short": 0.25}, {"good": 3.0, "short": 1.0})
    ]
    assert found[0] is not None
    assert found[0] == found[1]
    assert sweeping._share(Point("nothing", {"good": 0.0}), gain_P, np.full(NUM_PROMPTS, 0.5), base_PN) is None


def test_shares_survive_being_stored_and_files_without_them_are_read() -> None:
    sweep = measured(DIVERGENCES)
    raw = json.loads(json.dumps(sweep.to_json()))
    assert sweep_from_json(raw) == sweep
    del raw["limits"], raw["limit_answers"]
    for point in raw["points"]:
        del point["share"]
    old = sweep_from_json(raw)
    assert set(shares(old).values()) == {None}
    assert "limit" not in table(old)
    assert table(old).splitlines()[0] == table(sweep).splitlines()[0].partition("  share of limit")[0].rstrip()


def test_where_the_limit_is_unknown_the_table_has_a_dash_and_says_where_it_is_known() -> None:
    *lines, _, note = table(measured({**DIVERGENCES, "good": 1.9, "short": 0.01})).splitlines()
    assert [line.split()[-1] == "–" for line in lines[2:]] == [True, True, True, False]
    assert note == "share of limit: known from 0.05 to 1.77 nats with evaluate.limit_answers=16"
    greedy = measured(dict.fromkeys(DIVERGENCES, math.nan))
    assert set(shares(greedy).values()) == {None}


def test_too_few_prompts_for_an_interval_are_named_with_the_number_needed() -> None:
    *lines, _, note = table(measured(DIVERGENCES, num_prompts=4)).splitlines()
    assert "inf" not in lines[-1]
    assert note == f"share of limit: no intervals with prompts.evaluation=4; at least {limit.MIN_PROMPTS} are needed"
    both = table(measured({**DIVERGENCES, "good": 1.9}, num_prompts=4)).splitlines()
    assert ["known from" in line or "no intervals" in line for line in both[-3:]] == [False, True, True]


def test_without_base_answers_nothing_is_said_about_limits() -> None:
    sweep = measured(DIVERGENCES, num_answers=0)
    assert sweep.limits == {}
    assert "limit" not in table(sweep)
    assert table(sweep) == table(replace(measured(DIVERGENCES), limit_answers=0))


def test_shares_as_text() -> None:
    assert share_text(None) == "–"
    assert share_text(Estimate(0.5, -0.125, 0.75)) == "0.50 [-0.12, 0.75]"
    assert share_text(Estimate(0.5, -math.inf, math.inf)) == "0.50"


def test_a_request_has_the_seed_of_its_prompt() -> None:
    asked = sweeping.requests(POINTS[1], PROMPTS, 6.0, 3.0, SamplingParams(8), first_seed=100)
    assert [request.params.seed for _, request in asked] == list(range(100, 100 + NUM_PROMPTS))
