"""Seconds of every stage of a run on given machines, and what holds each stage up.

From Python, with rates that were measured:

    rates = Rates(tokens_per_s=500, guided_tokens_per_s=200, step_s=2, actor_start_s=15, train_start_s=30,
                  answers_per_s=1000)
    run = predict(config, None, Machines(count=4, cpus=2, memory_gib=8), rates, Lengths(prompt=60, answer=40))
    run.seconds  # {"rollouts i0": ..., "labels i0": ..., "train i0": ..., ...}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mavis_dist.config import Config
from mavis_dist.plan import PlanError, make_plan, tasks_of
from mavis_dist.sizing.machines import Machines
from mavis_dist.sizing.memory import Models, with_changes
from mavis_dist.sizing.rates import (
    TRAIN_START_S,
    Rates,
    actor_start_s,
    answers_per_s,
    decoding_s,
    label_start_s,
    tokens_per_s,
    train_step_s,
)
from mavis_dist.sizing.simulate import Faults, Gang, Queue, Ran, simulate
from mavis_dist.sizing.workload import Decoding, Labels, Lengths, Stage, Training, stages

ESTIMATED, ASSUMED, NONE = Rates(), Lengths(), Faults()
ALL = 16_000  # actors, more than fit on any number of COUNTS
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)  # of machines
TAIL = 1.25  # times as long as with equally busy actors


@dataclass(frozen=True)
class Prediction:
    """A run on some machines."""

    machines: Machines
    ran: list[Ran]
    reasons: dict[str, str]  # by stage, what holds it up
    utilisation: float  # share of all GPUs' time, without any of all cores', with work that counted

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return {one.name: one.seconds for one in self.ran}

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The longest stage, and what holds it up."""
        longest = max(self.ran, key=lambda one: one.seconds)
        return f"{longest.name}: {self.reasons[longest.name]}"

    def cost(self, seconds: float) -> float | None:
        """Of all machines for so long; None without a price."""
        price = self.machines.price_per_hour
        return None if price is None else price * self.machines.count * seconds / 3600


def predict(
    config: Config,
    models: Models | None,
    machines: Machines,
    rates: Rates = ESTIMATED,
    lengths: Lengths = ASSUMED,
    faults: Faults = NONE,
) -> Prediction:
    """Simulate all stages of a run.

    Args:
        models: None if `rates` has all that they would tell.

    Raises:
        PlanError: the machines are too small for the config.
        UserError: they fail so often that a stage does not end.
    """
    at_once = make_plan(config, machines.nodes).fits_at_once
    ran, reasons, busy, was_decoding = [], {}, 0.0, False
    for stage in stages(config, lengths):
        simulated = _simulated(config, models, machines, rates, lengths, at_once, stage)
        if was_decoding and isinstance(stage, Decoding) and isinstance(simulated, Queue):  # the same actors
            simulated = replace(simulated, start_s=0.0)
        was_decoding = isinstance(stage, Decoding) or (isinstance(stage, Labels) and stage.are_actors_idle)
        one = simulate(simulated, faults)
        ran.append(one)
        reasons[one.name] = _reason(config, machines, stage, simulated, one)
        busy += one.busy_s * _devices(config, machines, stage)
    available = machines.count * (machines.gpus or machines.cpus) * sum(one.seconds for one in ran)
    return Prediction(machines, ran, reasons, busy / available if available else 1.0)


def scaling(
    config: Config,
    models: Models | None,
    machines: Machines,
    rates: Rates = ESTIMATED,
    lengths: Lengths = ASSUMED,
    faults: Faults = NONE,
) -> list[Prediction]:
    """The same run on 1 to 1,000 of these machines with as many rollout actors as fit, where it fits."""
    wide, found = with_changes(config, ("rollout.actors", ALL)), []
    for count in COUNTS:
        try:
            found.append(predict(wide, models, replace(machines, count=count), rates, lengths, faults))
        except PlanError:
            continue
    return found


def num_actors(config: Config, machines: Machines) -> int:
    """Rollout actors that run at the same time."""
    return min(config.rollout.actors, _actor_slots(config, machines) * machines.count // config.base.tensor_parallel)


def _actor_slots(config: Config, machines: Machines) -> int:
    """Processes of rollout actors that fit on a machine."""
    return machines.node.slots(config.rollout.cpus_per_actor, config.rollout.gpus_per_actor)


def _simulated(
    config: Config,
    models: Models | None,
    machines: Machines,
    rates: Rates,
    lengths: Lengths,
    at_once: int,
    stage: Stage,
) -> Queue | Gang:
    if isinstance(stage, Decoding):
        return _decoding(config, models, machines, rates, lengths, stage)
    if isinstance(stage, Labels):
        cores = max(1, int(machines.cpus))
        parts = len(tasks_of(range(stage.num_shards), len(stage.answers), machines.nodes))
        item_s = [
            answers / parts / answers_per_s(config, objective, rates)
            for answers, objective in zip(stage.answers, stage.objectives, strict=True)
            for _ in range(parts)
        ]
        places = min(len(item_s), cores * machines.count)
        return Queue(stage.stage, item_s, [task // cores for task in range(places)], label_start_s(rates))
    train = config.train
    slots = machines.node.slots(train.cpus_per_worker, train.gpus_per_worker)
    return Gang(
        stage.stage,
        stage.num_fits,
        [
            frozenset(worker // slots for worker in range(place * train.workers, (place + 1) * train.workers))
            for place in range(min(at_once, stage.num_fits))
        ],
        stage.steps,
        train_step_s(config, models, machines, rates, stage),
        TRAIN_START_S if rates.train_start_s is None else rates.train_start_s,
    )


def _decoding(
    config: Config, models: Models | None, machines: Machines, rates: Rates, lengths: Lengths, stage: Decoding
) -> Queue:
    speed = tokens_per_s(config, models, machines, rates, stage, lengths)
    # No item is faster than the tokens of one answer, one after the other.
    least_s = 0.0
    if models is not None:
        answer = lengths.answer or config.rollout.max_tokens
        least_s = answer * decoding_s(config, models, machines, stage, lengths, rows=1)
    slots, size = _actor_slots(config, machines), config.base.tensor_parallel
    return Queue(
        stage.stage,
        [max(tokens / speed, least_s) for tokens in stage.items],
        [actor * size // slots for actor in range(num_actors(config, machines))],
        actor_start_s(config, models, rates),
    )


def _devices(config: Config, machines: Machines, stage: Stage) -> float:
    """GPUs, or without any cores, that one place of a stage occupies."""
    rollout, train = config.rollout, config.train
    if isinstance(stage, Decoding):
        return config.base.tensor_parallel * (rollout.gpus_per_actor if machines.gpus else rollout.cpus_per_actor)
    if isinstance(stage, Labels):
        return 0.0 if machines.gpus else 1.0
    return train.workers * (train.gpus_per_worker if machines.gpus else train.cpus_per_worker)


def _reason(config: Config, machines: Machines, stage: Stage, simulated: Queue | Gang, ran: Ran) -> str:
    """What holds a stage up, and the config key that changes it if there is one."""
    if simulated.start_s > ran.seconds / 2:
        return f"starting takes {simulated.start_s:.0f} of {ran.seconds:.0f} s, which more machines do not shorten"
    if isinstance(stage, Labels):
        if len(stage.answers) * stage.num_shards <= ran.places:
            remedy = "" if stage.are_actors_idle else _smaller_shards(config)
            return f"{ran.places} tasks of one core, one per objective and shard{remedy}"
        return "tasks of one core are busy, add machines or a faster reward"
    if isinstance(stage, Training):
        if ran.places < stage.num_fits:
            return f"{ran.places} of {stage.num_fits} objectives train at the same time, add machines"
        return f"every objective takes all of it, raise train.workers (is {config.train.workers})"
    return " ".join(_decoding_reasons(config, machines, stage, simulated, ran))


def _decoding_reasons(
    config: Config, machines: Machines, stage: Decoding, simulated: Queue | Gang, ran: Ran
) -> Iterator[str]:
    is_growing, num_items = stage.stage.startswith("rollouts"), len(stage.items)
    unit = "shards" if is_growing else "batches of requests"
    remedy = _smaller_shards(config) if is_growing else ""
    even_s = simulated.start_s + ran.busy_s / ran.places
    fitting = num_actors(with_changes(config, ("rollout.actors", ALL)), machines)
    if num_items <= ran.places:
        yield f"{num_items} {unit} for {ran.places} actors{remedy}"
    elif ran.seconds > TAIL * even_s:
        yield f"ends with its last {unit}{remedy}"
    elif ran.places < fitting:
        yield f"rollout.actors is {ran.places} and {fitting} fit, raise it"
    else:
        yield "actors are busy, add machines"


def _smaller_shards(config: Config) -> str:
    return f", lower rollout.prompts_per_shard (is {config.rollout.prompts_per_shard})"
