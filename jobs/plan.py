"""What a config needs on given machines: memory, time, cost, and what 1 to 1,000 of them would change. Starts nothing.

python -m jobs.plan --config jobs/configs/hh_rlhf.yaml --machines 4x8xH100 [options] [dotted.key=value ...]

Reads configs of models, not their weights. Exit code 1: something does not fit; the lines that begin with "does not
fit" name the key to change.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import arguments
from mavis_dist import environment

if TYPE_CHECKING:
    from mavis_dist.config import Config
    from mavis_dist.sizing.machines import Machines
    from mavis_dist.sizing.memory import Models

HOUR = 3600.0
MAY_BE_ZERO = {"--price-per-hour", "--actor-start-seconds", "--train-start-seconds", "--prompt-tokens", "--mtbf-hours"}
MAY_BE_ZERO |= {"--label-start-seconds", "--restart-seconds", "--slow-share", "--seed"}
# Option, metavar, default, meaning. Without a default the number is estimated, or that of the table of GPUs.
OPTIONS: tuple[tuple[str, str, float | None, str], ...] = (
    ("--gpu-memory", "GIB", None, "memory of a GPU"),
    ("--gpu-tflops", "TFLOPS", None, "dense bfloat16 products of a GPU"),
    ("--gpu-bandwidth", "GB_PER_S", None, "reads of a GPU's memory"),
    ("--cpus", "CORES", None, "cores of a machine (with GPUs 16 for each)"),
    ("--memory", "GIB", None, "memory of a machine (128 per GPU, else 4 per core)"),
    ("--price-per-hour", "PRICE", None, "of a machine; without it there are no costs"),
    ("--tokens-per-second", "N", None, "measured: of a rollout actor without value models"),
    ("--guided-tokens-per-second", "N", None, "measured: of one with them"),
    ("--step-seconds", "S", None, "measured: of a training step"),
    ("--answers-per-second", "N", None, "measured: that a task of one core labels"),
    ("--actor-start-seconds", "S", None, "measured: until an actor has its models"),
    ("--train-start-seconds", "S", None, "measured: until the workers of a fit train"),
    ("--label-start-seconds", "S", None, "measured: until a task of one core labels"),
    ("--prompt-tokens", "N", 100, "tokens of a prompt with its template"),
    ("--answer-tokens", "N", None, "mean tokens of an answer (rollout.max_tokens)"),
    ("--mtbf-hours", "H", 5000, "mean time between failures of a machine; 0: none fails"),
    ("--restart-seconds", "S", 300, "until a failed machine or its replacement is there"),
    ("--slow-share", "SHARE", 0.02, "share of machines that are slow"),
    ("--slowdown", "FACTOR", 1.5, "how many times as long a slow machine takes"),
    ("--seed", "N", 0, "of slow machines and failures"),
)


def main(argv: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    config = arguments.config_of(given)
    fits = arguments.refusing(lambda: run(config, given, sys.argv[1:] if argv is None else argv))
    raise SystemExit(0 if fits else 1)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("plan", "Print what a config needs on given machines: memory, time and cost.")
    parser.add_argument(
        "--machines", metavar="4x8xH100", help="machines x GPUs x kind, or 2x16cpu (default: this machine)"
    )
    parser.add_argument("--shape", metavar="NAME", help="size of base.model instead of its config: 1b, 7b, 13b, 70b")
    parser.add_argument("--value-shape", metavar="NAME", help="the same of value.backbone, where it is not base")
    for option, metavar, default, meaning in OPTIONS:
        shown = meaning if default is None else f"{meaning} (default: {default:g})"
        parser.add_argument(option, type=_number, metavar=metavar, default=default, help=shown)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    return parser


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def run(config: Config, given: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Print the plan; returns whether everything fits."""
    from mavis_dist.sizing import report
    from mavis_dist.sizing.rates import Rates
    from mavis_dist.sizing.simulate import Faults
    from mavis_dist.sizing.workload import Lengths

    _check_options(given)
    machines = _machines(given)
    rates = Rates(
        given.tokens_per_second,
        given.guided_tokens_per_second,
        given.step_seconds,
        given.answers_per_second,
        given.actor_start_seconds,
        given.train_start_seconds,
        given.label_start_seconds,
    )
    faults = Faults(
        int(given.seed),
        given.slow_share,
        given.slowdown,
        given.mtbf_hours * HOUR or inf,
        given.restart_seconds,
    )
    lengths = Lengths(int(given.prompt_tokens), given.answer_tokens)
    sizing = report.size_up(config, _models(config, given), machines, rates, lengths, faults)
    print(report.text(sizing))
    if given.json is not None:
        line = f"python -m jobs.plan {shlex.join(argv)}"
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"plan": report.to_json(sizing), **_provenance(line)}, indent=1) + "\n")
    return not sizing.problems


def _machines(given: argparse.Namespace) -> Machines:
    """Raises UserError."""
    from mavis_dist.sizing.machines import parse_machines, this_machine
    from mavis_dist.types import UserError

    machines = this_machine() if given.machines is None else parse_machines(given.machines)
    changed = {"cpus": given.cpus, "memory_gib": given.memory, "price_per_hour": given.price_per_hour}
    machines = replace(machines, **_present(changed))
    of_gpu = _present({"memory_gib": given.gpu_memory, "tflops": given.gpu_tflops, "gb_per_s": given.gpu_bandwidth})
    if not of_gpu:
        return machines
    if machines.gpu is None:
        raise UserError("--gpu-memory, --gpu-tflops and --gpu-bandwidth need machines with GPUs: give --machines")
    return replace(machines, gpu=replace(machines.gpu, **of_gpu))


def _present(options: dict[str, float | None]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _check_options(given: argparse.Namespace) -> None:
    """Raises UserError for a number of 0 where it means nothing."""
    from mavis_dist.types import UserError

    for option, *_ in OPTIONS:
        if option not in MAY_BE_ZERO and getattr(given, option[2:].replace("-", "_")) == 0:
            raise UserError(f"{option} is 0: give a number above 0, or leave the option out")


def _models(config: Config, given: argparse.Namespace) -> Models:
    """Sizes of base and value model; raises UserError."""
    from mavis_dist.sections import OF_BASE
    from mavis_dist.sizing.memory import Models
    from mavis_dist.sizing.sizes import read_size, shape_size

    base = shape_size(given.shape) if given.shape else read_size(config.base.model)
    if config.value.kind == "states":
        return Models(base, None)
    backbone = base
    if config.value.backbone != OF_BASE:
        backbone = shape_size(given.value_shape) if given.value_shape else read_size(config.value.backbone)
    return Models(base, backbone.backbone(config.value.layers))


def _provenance(line: str) -> dict[str, Any]:
    """Command line, the machine that it ran on, and the versions of what counts parameters."""
    from mavis_dist.sizing.machines import this_machine

    here = this_machine()
    machine = {"processor": platform.machine(), "cores": here.cpus, "memory_gib": here.memory_gib, "gpus": []}
    return {"command": line, "machine": machine, "versions": environment.versions(("torch", "transformers"))}


if __name__ == "__main__":
    main()
