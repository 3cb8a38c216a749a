"""The rates of a simulation from two runs on one node, of which one has little to do, and what follows from them.

A stage takes start + work / speed: the two runs are two points of that line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mavis_dist.config import Config
from mavis_dist.sizing.machines import Machines
from mavis_dist.sizing.predict import predict
from mavis_dist.sizing.rates import Rates
from mavis_dist.sizing.workload import Lengths, stages
from mavis_dist.types import UserError

ROLLOUTS, LABELS, TRAIN, SWEEP = "rollouts i0", "labels i0", "train i0", "evaluate"
SCORING = "labels "  # begins the simulation's name of what a stage of answers ends with


@dataclass(frozen=True)
class Run:
    """A run on one node."""

    config: Config
    lengths: Lengths
    seconds: Mapping[str, float]  # by stage
    peaks: Mapping[str, int] = field(default_factory=dict)  # by kind of process, bytes


@dataclass(frozen=True)
class Slowdown:
    """How many times as long processes take as one on one node."""

    decoding: float = 1.0  # one on each node
    training: float = 1.0  # of all fits at the same time


def rates_of(little: Run, much: Run) -> Rates:
    """Rates that explain both runs.

    Raises:
        UserError: the longer run took no longer, as on a disturbed machine.
    """
    actor_start_s, token_s = _line(little, much, ROLLOUTS, _tokens)
    num_fits = _stage(much, TRAIN).num_fits  # one after the other on one node
    train_start_s, step_s = (part / num_fits for part in _line(little, much, TRAIN, lambda stage: stage.steps))
    guided_s = much.seconds[SWEEP] / _tokens(_stage(much, SWEEP))
    return Rates(
        tokens_per_s=1 / token_s,
        guided_tokens_per_s=1 / guided_s,
        step_s=step_s,
        actor_start_s=actor_start_s,
        train_start_s=train_start_s,
        label_start_s=little.seconds[LABELS],  # little else
    )


def predicted(config: Config, count: int, rates: Rates, lengths: Lengths, slowdown: Slowdown) -> dict[str, float]:
    """Seconds by stage on so many nodes of one core."""
    machines = Machines(count=count, cpus=1, memory_gib=8)
    decoding, training = (
        by_stage(predict(config, None, machines, slower(rates, factor), lengths).seconds)
        for factor in (slowdown.decoding, slowdown.training)
    )
    return {**decoding, TRAIN: training[TRAIN]}


def slower(rates: Rates, factor: float) -> Rates:
    """The rates of processes that take so many times as long."""

    def divided(rate: float | None) -> float | None:
        return None if rate is None else rate / factor

    def multiplied(seconds: float | None) -> float | None:
        return None if seconds is None else seconds * factor

    return replace(
        rates,
        tokens_per_s=divided(rates.tokens_per_s),
        guided_tokens_per_s=divided(rates.guided_tokens_per_s),
        answers_per_s=divided(rates.answers_per_s),
        step_s=multiplied(rates.step_s),
        actor_start_s=multiplied(rates.actor_start_s),
        train_start_s=multiplied(rates.train_start_s),
        label_start_s=multiplied(rates.label_start_s),
    )


def by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """The simulation's seconds as a run records them: scoring belongs to the stage of the answers."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        stage = name.removeprefix(SCORING)
        key = stage if stage in found else name
        found[key] = found.get(key, 0.0) + value
    return found


def _line(little: Run, much: Run, name: str, work: Callable[[Any], float]) -> tuple[float, float]:
    """Seconds that a stage takes without work, and those of a unit of work."""
    (work_1, seconds_1), (work_2, seconds_2) = ((work(_stage(run, name)), run.seconds[name]) for run in (little, much))
    each_s = (seconds_2 - seconds_1) / (work_2 - work_1)
    if each_s <= 0:
        raise UserError(
            f"{name} took {seconds_1:.0f} s for little and {seconds_2:.0f} s for much: measure again, alone"
        )
    return max(0.0, seconds_1 - work_1 * each_s), each_s


def _stage(run: Run, name: str) -> Any:
    return next(stage for stage in stages(run.config, run.lengths) if stage.stage == name)


def _tokens(stage: Any) -> float:
    return float(sum(stage.items))
