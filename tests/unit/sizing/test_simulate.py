"""The simulation: closed forms without faults, and what more machines and failures can do."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_dist.sizing.simulate import Faults, Gang, Queue, simulate
from mavis_dist.types import UserError

ITEMS = st.lists(st.floats(1, 50), min_size=1, max_size=25)
NOTHING = Faults()
FAULTS = st.builds(Faults, seed=st.integers(0, 99), mtbf_s=st.floats(100, 2000), restart_s=st.floats(0, 30))


def queue(items: list[float], machines: int, each: int = 1, start_s: float = 5.0) -> Queue:
    return Queue("rollouts", items, [actor // each for actor in range(machines * each)], start_s)


def gang(fits: int, places: int, workers: int = 2, steps: int = 20, step_s: float = 2.0) -> Gang:
    machines = [frozenset(range(place * workers, (place + 1) * workers)) for place in range(places)]
    return Gang("train", fits, machines, steps, step_s, start_s=7.0, checkpoint_every_s=10.0)


@settings(derandomize=True, deadline=None)
@given(ITEMS)
def test_one_actor_takes_all_items_one_after_the_other(items: list[float]) -> None:
    ran = simulate(queue(items, 1), NOTHING)
    assert ran.seconds == pytest.approx(5 + sum(items))
    assert (ran.restarts, ran.lost_s) == (0, 0)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8))
def test_fits_take_as_many_turns_as_places_leave(fits: int, places: int) -> None:
    ran = simulate(gang(fits, places), NOTHING)
    assert ran.seconds == pytest.approx(ceil(fits / places) * (7 + 20 * 2))


@settings(derandomize=True, deadline=None)
@given(ITEMS, st.integers(1, 6), st.integers(1, 3))
def test_more_machines_are_never_slower(items: list[float], machines: int, each: int) -> None:
    fewer, more = (simulate(queue(items, count, each), NOTHING) for count in (machines, machines + 1))
    assert more.seconds <= fewer.seconds + 1e-9
    assert more.seconds >= 5 + max(max(items), sum(items) / ((machines + 1) * each)) - 1e-9


@settings(derandomize=True, deadline=None)
@given(ITEMS, st.integers(1, 5), st.integers(1, 3), FAULTS)
def test_failures_never_make_it_faster(items: list[float], machines: int, each: int, faults: Faults) -> None:
    stage = queue(items, machines, each)
    assert simulate(stage, faults).seconds >= simulate(stage, NOTHING).seconds - 1e-9


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), FAULTS)
def test_failures_never_make_training_faster(fits: int, places: int, faults: Faults) -> None:
    stage = gang(fits, places)
    failed, whole = simulate(stage, faults), simulate(stage, NOTHING)
    assert failed.seconds >= whole.seconds - 1e-9
    if failed.restarts == 0:
        assert failed == whole


@settings(derandomize=True, deadline=None)
@given(ITEMS, FAULTS)
def test_the_same_seed_gives_the_same_run(items: list[float], faults: Faults) -> None:
    assert simulate(queue(items, 3), faults) == simulate(queue(items, 3), faults)


def test_a_lost_actor_restarts_its_item_from_the_beginning() -> None:
    ran = simulate(queue([30.0], 1), Faults(seed=3, mtbf_s=40.0, restart_s=3.0))
    assert ran.restarts > 0
    # Every attempt starts the actor anew and waits for its machine.
    assert ran.seconds >= 5 + 30 + ran.lost_s + 3 * ran.restarts


def test_a_fit_resumes_from_its_checkpoint() -> None:
    faults = Faults(mtbf_s=150.0, restart_s=1.0, seed=1)
    stage = gang(1, 1, steps=50)
    ran, without = simulate(stage, faults), simulate(replace(stage, checkpoint_every_s=1e9), faults)
    assert ran.restarts > 0
    assert ran.lost_s <= ran.restarts * (stage.checkpoint_every_s + stage.step_s)
    assert ran.seconds < without.seconds


def test_a_slow_machine_holds_up_its_fit_and_only_its_own_items() -> None:
    slow = Faults(slow_share=1.0, slowdown=2.0)
    assert simulate(gang(1, 1), slow).seconds == pytest.approx(7 + 2 * 20 * 2)
    some = next(
        Faults(seed, 0.5, 3.0) for seed in range(99) if {Faults(seed, 0.5, 3.0).slowness(m) for m in (0, 1)} == {1, 3}
    )
    ran = simulate(queue([10.0] * 4, 2), some)
    assert ran.seconds == pytest.approx(5 + 30)  # three items of 10 s beside one of 30 s
    assert ran.utilisation == pytest.approx(40 / (2 * 35))


def test_machines_that_fail_too_often_are_refused() -> None:
    with pytest.raises(UserError, match="--mtbf-hours"):
        simulate(queue([1000.0], 1), Faults(mtbf_s=1.0))
    with pytest.raises(UserError, match="--mtbf-hours"):  # no actor gets ready
        simulate(queue([1.0], 1, start_s=100.0), Faults(mtbf_s=1.0))
    with pytest.raises(UserError, match="--mtbf-hours"):
        simulate(gang(1, 1, steps=1000), Faults(mtbf_s=1.0))
