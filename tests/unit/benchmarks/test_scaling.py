"""Rates from two runs, and processes beside each other."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import memory
from benchmarks.scaling.contention import passes_per_s, steps_per_s
from benchmarks.scaling.memory import estimated, peak_of, watched
from benchmarks.scaling.rates import Run, Slowdown, predicted, rates_of
from mavis_dist import config as config_module
from mavis_dist.sizing.rates import Rates
from mavis_dist.sizing.workload import Lengths
from mavis_dist.types import UserError
from tests.tiny import write_base

LENGTHS = Lengths(50, 20.0)
TRUE = Rates(
    tokens_per_s=150.0,
    guided_tokens_per_s=60.0,
    step_s=0.8,
    answers_per_s=2000,
    actor_start_s=20,
    train_start_s=50,
    label_start_s=4,
)


def made_up(folder: Path, *overrides: str, count: int = 1, rates: Rates = TRUE) -> Run:
    """A run that takes exactly as long as the simulation says."""
    config = config_module.load(scaling.write_config(folder, "run"), overrides)
    return Run(config, LENGTHS, predicted(config, count, rates, LENGTHS, Slowdown()))


def test_rates_are_found_from_two_runs_on_one_machine(tmp_path: Path) -> None:
    rates = rates_of(made_up(tmp_path, *scaling.LITTLE), made_up(tmp_path))
    for count in scaling.COUNTS:
        found, true = made_up(tmp_path, count=count, rates=rates), made_up(tmp_path, count=count)
        assert sum(found.seconds.values()) == pytest.approx(sum(true.seconds.values()), rel=0.01)
    assert rates.actor_start_s == pytest.approx(20)
    assert rates.train_start_s == pytest.approx(50)


def test_stages_on_shared_cores_take_as_many_times_as_long_as_what_they_compute(tmp_path: Path) -> None:
    run = made_up(tmp_path, count=4)
    slowed = predicted(run.config, 4, TRUE, LENGTHS, Slowdown(decoding=3.0, training=1.5))
    for name, seconds in slowed.items():
        assert seconds == pytest.approx((1.5 if name == "train i0" else 3.0) * run.seconds[name])


def test_passes_and_steps_are_counted_in_all_processes(tmp_path: Path) -> None:
    model = str(write_base(tmp_path))
    assert passes_per_s(model, 2, length_s=0.1) > 0
    assert steps_per_s(model, 1, 2, length_s=0.1) > 0


def test_the_largest_peak_of_a_kind_of_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "EVERY_S", 0.05)
    monkeypatch.setattr(memory, "TITLES", {"python": sys.executable, "none": "no such title"})
    code = "import sys, time; data = b'x' * {}; print(flush=True); sys.stdin.read()"
    with watched() as peaks:
        for size in (60 * 2**20, 20 * 2**20):
            child = subprocess.Popen(
                [sys.executable, "-c", code.format(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)
            child.communicate()
    assert 60 * 2**20 < peaks["python"] < 120 * 2**20
    assert peaks["none"] == 0
    assert peak_of(child.pid) == 0


def test_estimates_are_those_of_the_plan(tmp_path: Path) -> None:
    config = config_module.load(
        scaling.write_config(tmp_path, "run"), [f"base.model={write_base(tmp_path)}", "value.layers=1"]
    )
    assert all(need > 2**30 for need in estimated(config, LENGTHS).values())
    assert set(estimated(config, LENGTHS)) == set(memory.TITLES)


def test_a_disturbed_measurement_is_refused(tmp_path: Path) -> None:
    disturbed = made_up(tmp_path, *scaling.LITTLE, rates=replace(TRUE, actor_start_s=300.0))
    with pytest.raises(UserError, match=r"rollouts i0 took .* measure again"):
        rates_of(disturbed, made_up(tmp_path))
