"""The plan as tables and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mavis_dist.config import Config
from mavis_dist.plan import PlanError, check_serving, make_plan
from mavis_dist.sizing.machines import GIB, Machines
from mavis_dist.sizing.memory import Fit, Models, fits
from mavis_dist.sizing.predict import Prediction, num_actors, predict, scaling
from mavis_dist.sizing.rates import Rates, tokens_per_s, train_step_s
from mavis_dist.sizing.simulate import Faults
from mavis_dist.sizing.workload import Decoding, Lengths, Training, stages
from mavis_dist.tables import text_table

NONE = "–"


@dataclass(frozen=True)
class Sizing:
    """All that is said of a config on some machines."""

    machines: Machines
    placement: list[str]
    memory: list[Fit]
    problems: list[str]
    run: Prediction | None  # without faults; None: it cannot run there
    curve: list[Prediction]  # over numbers of machines, with faults
    notes: list[str]


def size_up(
    config: Config, models: Models, machines: Machines, rates: Rates, lengths: Lengths, faults: Faults
) -> Sizing:
    """Raises UserError if machines fail too often to simulate them."""
    memory = fits(config, models, lengths, machines)
    problems = [*_device_problems(config, models, machines), *_memory_problems(memory)]
    placement: list[str] = []
    run = None
    try:
        placement = _placement(config, machines)
        run = predict(config, models, machines, rates, lengths)
    except PlanError as error:
        problems.append(str(error))
    try:
        check_serving(config, machines.nodes)
    except PlanError as error:
        problems.append(str(error))
    curve = scaling(config, models, machines, rates, lengths, faults)
    notes = [*_notes(config, models, machines, rates, lengths, faults)]
    return Sizing(machines, placement, memory, problems, run, curve, notes)


def _device_problems(config: Config, models: Models, machines: Machines) -> Iterator[str]:
    from mavis_dist.models.lockstep import group_sizes

    size, sizes = config.base.tensor_parallel, group_sizes(models.base.key_heads)
    if size not in sizes:
        possible = ", ".join(map(str, sizes))
        yield f"base.tensor_parallel={size} does not divide the heads of keys: set one of {possible}"
    if not config.base.device.startswith("cuda"):
        return
    if machines.gpu is None:
        yield f"base.device={config.base.device} and the machines have no GPU: set base.device=cpu, or other --machines"
        return
    for section, key in (("rollout", "gpus_per_actor"), ("train", "gpus_per_worker"), ("serve", "gpus_per_replica")):
        if getattr(getattr(config, section), key) == 0:
            yield f"base.device={config.base.device} and {section}.{key}=0 reserves none: set {section}.{key}=1"


def _memory_problems(memory: Sequence[Fit]) -> Iterator[str]:
    for fit in memory:
        if fit.remedy is not None:
            need, has = fit.need.total, fit.room
            if need <= has:
                need, has = fit.need.on_host, fit.host_room
            yield f"{fit.need.process} needs {need / GIB:.1f} GiB and has {has / GIB:.1f}: {fit.remedy}"


def _placement(config: Config, machines: Machines) -> list[str]:
    """What runs where; raises PlanError."""
    plan = make_plan(config, machines.nodes)
    rollout, train, size = config.rollout, config.train, config.base.tensor_parallel
    group = f" of {size} processes" if size > 1 else ""
    return [
        f"rollout actors      {num_actors(config, machines)}{group}, {rollout.cpus_per_actor:g} cores + "
        f"{rollout.gpus_per_actor:g} GPU each",
        f"training workers    {train.workers} per objective, {plan.fits_at_once} of {len(config.objectives)} "
        f"objectives at a time, {train.cpus_per_worker:g} cores + {train.gpus_per_worker:g} GPU each",
        f"service             {config.serve.placement}, {config.serve.cpus_per_replica:g} cores + "
        f"{config.serve.gpus_per_replica:g} GPU per process",
        *plan.notes,
    ]


def _notes(
    config: Config, models: Models, machines: Machines, rates: Rates, lengths: Lengths, faults: Faults
) -> Iterator[str]:
    """Where the numbers come from."""
    for stage in stages(config, lengths):
        if isinstance(stage, Decoding) and stage.stage in ("rollouts i0", "evaluate"):
            given = rates.guided_tokens_per_s if stage.is_guided else rates.tokens_per_s
            speed = tokens_per_s(config, models, machines, rates, stage, lengths)
            yield f"{stage.stage}: {speed:,.0f} tokens/s of an actor, {_source(given)}"
        if isinstance(stage, Training) and stage.stage == "train i0":
            seconds = train_step_s(config, models, machines, rates, stage)
            yield f"train i0: {seconds:.3g} s for each of {stage.steps} steps, {_source(rates.step_s)}"
    source = "as given" if rates.answers_per_s is not None else "estimates; rules and embedder measured on one core"
    yield f"labels: {source}; they depend on the rewards' models"
    answer = f"{lengths.answer:g}" if lengths.answer else f"{config.rollout.max_tokens} (rollout.max_tokens)"
    yield f"lengths: prompts of {lengths.prompt} tokens, answers of {answer}: assumed"
    yield "memory: arithmetic; activations, passes, logits and 1 GiB of libraries are estimates, adjusted to one H100"
    yield (
        f"by number of machines: {faults.slow_share:.0%} are {faults.slowdown:g} times as slow, each fails once in "
        f"{faults.mtbf_s / 3600:,.0f} hours and is back after {faults.restart_s:g} s: assumed, seed {faults.seed}"
    )


def _source(given: float | None) -> str:
    return "as given" if given is not None else "an estimate, whose constants come from one H100 or two cores"


def text(sizing: Sizing) -> str:
    """All tables."""
    parts = [f"machines            {sizing.machines.text}", *sizing.placement, "", _memory_table(sizing.memory), ""]
    parts += [f"does not fit: {problem}" for problem in sizing.problems] or ["everything fits"]
    if sizing.run is not None:
        parts += ["", _stage_table(sizing.run), f"bottleneck: {sizing.run.bottleneck}"]
    if sizing.curve:
        parts += ["", _curve_table(sizing.curve)]
    return "\n".join([*parts, "", *sizing.notes])


def _memory_table(memory: Iterable[Fit]) -> str:
    rows = []
    for fit in memory:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in fit.need.on_device.items() if size >= 0.05 * GIB)
        cells = (f"{fit.need.total / GIB:.1f}", f"{fit.room / GIB:.1f}", "" if fit.fits else "no")
        rows.append([fit.need.process, str(fit.need.count), *cells, f"  {parts}"])
    head = ["GiB of a process", "count", "needs", "has", "fits", "  of which"]
    return text_table(head, rows, [20, 6, 9, 9, 6, 0])


def _stage_table(run: Prediction) -> str:
    parts = [(one.name, one.seconds, one.utilisation) for one in run.ran]
    rows = [
        [name, duration(seconds), _cost(run, seconds), f"{busy:.0%}"]
        for name, seconds, busy in [*parts, ("all", run.total_s, run.utilisation)]
    ]
    return text_table(["stage", "time", "cost", "busy"], rows, [16, 10, 12, 7])


def _curve_table(curve: Sequence[Prediction]) -> str:
    kinds = ("rollouts", "labels", "train")
    rows = []
    for run in curve:
        of_kind = [sum(s for name, s in run.seconds.items() if name.startswith(kind)) for kind in kinds]
        others = run.total_s - sum(of_kind)
        restarts = sum(one.restarts for one in run.ran)
        cells = [*map(duration, (*of_kind, others, run.total_s)), _cost(run, run.total_s), f"{run.utilisation:.0%}"]
        rows.append([str(run.machines.count), *cells, str(restarts), f"  {run.bottleneck}"])
    head = ["machines", *kinds, "answers", "all", "cost", "busy", "restarts", "  bottleneck"]
    return text_table(head, rows, [8, 10, 10, 10, 10, 10, 12, 7, 10, 0])


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _cost(run: Prediction, seconds: float) -> str:
    cost = run.cost(seconds)
    return NONE if cost is None else f"{cost:,.2f}" if cost < 100 else f"{cost:,.0f}"


def to_json(sizing: Sizing) -> dict[str, Any]:
    """All figures as plain values, in bytes and seconds."""
    return {
        "machines": asdict(sizing.machines),
        "placement": sizing.placement,
        "memory": [
            {
                "process": fit.need.process,
                "count": fit.need.count,
                "bytes": dict(fit.need.on_device),
                "host_bytes": fit.need.on_host,
                "room_bytes": fit.room,
                "fits": fit.fits,
                "remedy": fit.remedy,
            }
            for fit in sizing.memory
        ],
        "problems": sizing.problems,
        "run": None if sizing.run is None else _run_json(sizing.run),
        "by_machines": [_run_json(run) for run in sizing.curve],
        "notes": sizing.notes,
    }


def _run_json(run: Prediction) -> dict[str, Any]:
    return {
        "machines": run.machines.count,
        "seconds": run.seconds,
        "restarts": {one.name: one.restarts for one in run.ran},
        "utilisation": run.utilisation,
        "cost": run.cost(run.total_s),
        "bottleneck": run.bottleneck,
    }
