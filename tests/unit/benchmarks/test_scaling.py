"""Rates from two runs, and processes that get a part of a core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.common import figures
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.cores import GROUPS, limited
from benchmarks.scaling.rates import Run, by_stage, rates_of
from mavis_dist import config as config_module
from mavis_dist.sizing.machines import Machines
from mavis_dist.sizing.predict import predict
from mavis_dist.sizing.rates import Rates
from mavis_dist.sizing.workload import Lengths
from mavis_dist.types import UserError

LENGTHS = Lengths(50, 20.0)
TRUE = Rates(
    tokens_per_s=150.0, guided_tokens_per_s=60.0, step_s=0.8, answers_per_s=2000, actor_start_s=20, train_start_s=50
)
LOOP = "while True: pass"


def made_up(folder: Path, *overrides: str, count: int = 1, rates: Rates = TRUE) -> Run:
    """A run that takes exactly as long as the simulation says."""
    config = config_module.load(scaling.write_config(folder, "run"), overrides)
    machines = Machines(count=count, cpus=1, memory_gib=8)
    return Run(config, LENGTHS, by_stage(predict(config, None, machines, rates, LENGTHS).seconds))


def test_rates_are_found_from_two_runs_on_one_machine(tmp_path: Path) -> None:
    rates = rates_of(made_up(tmp_path, *scaling.LITTLE), made_up(tmp_path))
    for count in scaling.COUNTS:
        found, true = made_up(tmp_path, count=count, rates=rates), made_up(tmp_path, count=count)
        assert sum(found.seconds.values()) == pytest.approx(sum(true.seconds.values()), rel=0.01)
    assert rates.actor_start_s == pytest.approx(20)
    assert rates.train_start_s == pytest.approx(50)


def test_a_disturbed_measurement_is_refused(tmp_path: Path) -> None:
    disturbed = made_up(tmp_path, *scaling.LITTLE, rates=replace(TRUE, actor_start_s=300.0))
    with pytest.raises(UserError, match=r"rollouts i0 took .* measure again"):
        rates_of(disturbed, made_up(tmp_path))


def test_the_page_shows_the_figures() -> None:
    found = figures.read(figures.default_file(scaling.NAME))
    assert scaling.render(found) in scaling.PAGE.read_text()
    assert list(found["machines"]) == [str(count) for count in scaling.COUNTS]


@pytest.mark.skipif(not os.access(GROUPS / "cpu", os.W_OK), reason="may not limit processes")
def test_a_process_and_its_children_share_a_part_of_a_core() -> None:
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '{LOOP}'])"
    process = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        with limited(f"mavis-test-{process.pid}", process, 0.2) as folder:
            deadline = time.monotonic() + 20
            while not (children := process.children()) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert str(children[0].pid) in (Path(folder) / "cgroup.procs").read_text().split()
        assert not folder.exists()
    finally:
        for one in (*process.children(recursive=True), process):
            one.kill()
        process.wait()
