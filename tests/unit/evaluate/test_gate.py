"""The gate: which iteration is current."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mavis_dist.decode import Choice, SamplingParams, Scorer
from mavis_dist.evaluate import gate, sweep
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, RewardScale

RANDOM = np.random.default_rng(0)
FIRST = RANDOM.normal(size=40).tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), "run")


def shifted(by: float, noise: float = 0.02) -> list[float]:
    return (np.array(FIRST) + by + noise * RANDOM.normal(size=len(FIRST))).tolist()


def test_the_first_iteration_is_accepted(store: Store) -> None:
    assert gate.current(store, "brief", 3) is None
    decision = gate.decide(store, "brief", 0, FIRST, margin=0.05)
    assert decision.accepted
    assert decision.difference is None
    assert gate.current(store, "brief", 1) == 0
    assert gate.current(store, "other", 1) is None


@pytest.mark.parametrize(("shift", "accepted"), [(0.3, True), (0.0, True), (-0.03, True), (-0.1, False)])
def test_a_loss_beyond_the_margin_is_refused(store: Store, shift: float, accepted: bool) -> None:
    """Prompts differ by one sd, but the paired difference is precise to hundredths."""
    gate.decide(store, "brief", 0, FIRST, margin=0.05)
    decision = gate.decide(store, "brief", 1, shifted(shift), margin=0.05)
    assert decision.accepted == accepted
    assert decision.low < decision.difference < decision.high
    assert decision.difference == pytest.approx(shift, abs=0.02)
    assert gate.current(store, "brief", 2) == int(accepted)


def test_an_uncertain_difference_is_refused(store: Store) -> None:
    gate.decide(store, "brief", 0, FIRST, margin=0.05)
    assert not gate.decide(store, "brief", 1, shifted(0.1, noise=2.0), margin=0.05).accepted


def test_after_a_refusal_the_next_iteration_is_compared_with_the_same_one(store: Store) -> None:
    gate.decide(store, "brief", 0, FIRST, margin=0.05)
    gate.decide(store, "brief", 1, shifted(-1.0), margin=0.05)
    third = gate.decide(store, "brief", 2, shifted(0.2), margin=0.05)
    assert third.accepted
    assert third.current == 0
    assert gate.current(store, "brief", 2) == 0
    assert gate.current(store, "brief", 3) == 2
    assert third.verdict().startswith("accepted: soft value +0.2")


def test_without_validation_prompts_the_newest_is_current(store: Store) -> None:
    for iteration in (0, 1):
        assert gate.decide(store, "brief", iteration, [], margin=0.05).accepted
    assert gate.current(store, "brief", 2) == 1


def test_a_nat_costs_one_over_beta() -> None:
    def answer(*divergences: float) -> tuple[Choice, str]:
        choice = Choice(0)
        choice.divergences.extend(divergences)
        return choice, ""

    answers = [[answer(1.0, 2.0), answer(0.0)], [answer(4.0), answer()]]
    soft = gate.soft_values(answers, [3.0, 5.0, 1.0, 3.0], RewardScale(1.0, 2.0), beta=4.0)
    assert soft == pytest.approx([((1 - 3 / 4) + 2) / 2, ((0 - 1) + 1) / 2])


def test_iterations_are_compared_on_the_same_prompts_seeds_and_exact_divergences() -> None:
    prompts = [Prompt("a", "A"), Prompt("b", "B")]
    requests = gate.requests("brief", prompts, 6.0, 3.0, SamplingParams(8, top_k=7, n=3))
    assert [request.id for _, request in requests] == [gate.request_id("brief", prompt) for prompt in prompts]
    assert [request.params.seed for _, request in requests] == [0, 1]
    for _, request in requests:
        assert request.scorer is Scorer.FULL
        assert request.weights == {"brief": 1.0}
        assert (request.beta, request.tilt_cap) == (6.0, 3.0)
        assert (request.params.max_tokens, request.params.top_k, request.params.n) == (8, 7, 3)


def test_soft_values_of_a_first_iteration_can_follow_when_they_are_needed(store):
    gate.decide(store, "brief", 0, [], margin=0.05)
    gate.decide(store, "kind", 0, FIRST, margin=0.05)
    assert gate.without_soft_values(store, {"brief": 0, "kind": 0}) == {"brief": 0}
    gate.add_soft_values(store, "brief", 0, FIRST)
    assert gate.without_soft_values(store, {"brief": 0, "kind": 0}) == {}
    assert gate.current(store, "brief", 1) == 0
    decision = gate.decide(store, "brief", 1, shifted(0.2), margin=0.05)
    assert (decision.current, decision.accepted) == (0, True)


def test_too_few_prompts_to_tell_are_said_with_the_number_needed(store):
    gate.decide(store, "brief", 0, FIRST, margin=0.05)
    uncertain = gate.decide(store, "brief", 1, shifted(0.0, noise=0.5), margin=0.05)
    assert not uncertain.accepted
    # 40 prompts whose differences have an sd of .5 tell .15 sd: a third of that takes nine times as many.
    assert 200 < uncertain.prompts_needed < 700
    assert f"use about prompts.validation={uncertain.prompts_needed}" in uncertain.verdict()
    worse = gate.decide(store, "brief", 1, shifted(-1.0, noise=0.5), margin=0.05)
    assert not worse.accepted
    assert worse.prompts_needed is None
    assert "too few" not in worse.verdict()


def test_as_many_prompts_as_needed_are_enough():
    estimate = sweep.Estimate(0.0, -0.1, 0.1)
    needed = gate.prompts_needed(estimate, 50, margin=0.05)
    assert needed == 200
    assert gate.prompts_needed(sweep.Estimate(0.0, -0.05, 0.05), needed, margin=0.05) is None
    assert gate.prompts_needed(estimate, 50, margin=0.0) is None
