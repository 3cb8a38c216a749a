"""How well sentences steer: fronts over weights of two objectives, MATO with its ablations, relatives and alternatives.

    python -m benchmarks.steerability [--quick] [--json FILE] [--markdown FILE] [--run runs/study]

Needs a finished run: its prompts, the units of its rewards, and its value models for comparison. Whatever is measured
is kept in the run's folder: a measurement that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mavis_dist.environment  # noqa: F401  threads wait as they do in the actors
from benchmarks.common.command import add_outputs, write_json
from jobs.arguments import refusing

if TYPE_CHECKING:
    from benchmarks.steerability.fronts import Steerability


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    weights: tuple[float, ...]  # of the first objective of a pair
    prompts: int
    samples: dict[str, int]  # answers per prompt and weight, by way; one where it is not named


# Correlations are over six means, and two that change places count: those that are judged by them need more answers.
FULL = Scale((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 48, {"MATO": 4})
QUICK = Scale((0.0, 0.5, 1.0), 8, {})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steerability", description="Measure objectives in words."
    )
    parser.add_argument("--quick", action="store_true", help="rough figures in four minutes instead of an hour")
    add_outputs(parser, "words, but for --quick,")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/study"), help="folder of a finished run (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    measured = refusing(lambda: run(arguments.run, QUICK if arguments.quick else FULL))
    page = _page(measured, f"python -m benchmarks.steerability {given}".strip())
    if not arguments.quick:
        from benchmarks.common.markdown import write_part

        write_part(arguments.markdown, "words", page)
    if arguments.json:
        write_json(arguments.json, measured.to_json())
    print(page)


def run(folder: Path, scale: Scale) -> Steerability:
    from benchmarks.common import workload
    from benchmarks.steerability import answers, fronts

    config, store = workload.open_run(folder)
    return fronts.summarise(answers.measure(config, store, scale.weights, scale.prompts, scale.samples))


def _page(measured: Steerability, command: str) -> str:
    from benchmarks.steerability.page import render

    return render(measured, command)


if __name__ == "__main__":
    main()
