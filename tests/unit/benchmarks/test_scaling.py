"""Rates from two runs, and processes beside each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.contention import passes_per_s
from benchmarks.scaling.rates import Run, predicted, rates_of
from mavis_dist import config as config_module
from mavis_dist.sizing.rates import Rates
from mavis_dist.sizing.workload import Lengths
from mavis_dist.types import UserError
from tests.tiny import write_base

LENGTHS = Lengths(50, 20.0)
TRUE = Rates(
    tokens_per_s=150.0, guided_tokens_per_s=60.0, step_s=0.8, answers_per_s=2000, actor_start_s=20, train_start_s=50
)
NONE = dict.fromkeys(scaling.COUNTS, 1.0)  # no process is slower


def made_up(folder: Path, *overrides: str, count: int = 1, rates: Rates = TRUE) -> Run:
    """A run that takes exactly as long as the simulation says."""
    config = config_module.load(scaling.write_config(folder, "run"), overrides)
    return Run(config, LENGTHS, predicted(config, count, rates, LENGTHS, NONE))


def test_rates_are_found_from_two_runs_on_one_machine(tmp_path: Path) -> None:
    rates = rates_of(made_up(tmp_path, *scaling.LITTLE), made_up(tmp_path))
    for count in scaling.COUNTS:
        found, true = made_up(tmp_path, count=count, rates=rates), made_up(tmp_path, count=count)
        assert sum(found.seconds.values()) == pytest.approx(sum(true.seconds.values()), rel=0.01)
    assert rates.actor_start_s == pytest.approx(20)
    assert rates.train_start_s == pytest.approx(50)


def test_processes_on_shared_cores_are_slower_by_the_number_that_a_stage_keeps_busy(tmp_path: Path) -> None:
    run = made_up(tmp_path, count=4)
    slowed = predicted(run.config, 4, TRUE, LENGTHS, {2: 1.5, 4: 3.0})
    for name, seconds in slowed.items():
        assert seconds == pytest.approx((1.5 if name == "train i0" else 3.0) * run.seconds[name])


def test_passes_are_counted_in_all_processes(tmp_path: Path) -> None:
    assert passes_per_s(str(write_base(tmp_path)), 2, length_s=0.1) > 0


def test_a_disturbed_measurement_is_refused(tmp_path: Path) -> None:
    disturbed = made_up(tmp_path, *scaling.LITTLE, rates=replace(TRUE, actor_start_s=300.0))
    with pytest.raises(UserError, match=r"rollouts i0 took .* measure again"):
        rates_of(disturbed, made_up(tmp_path))
