"""How well preferences steer: fronts over weights of two objectives, by MATO, its ablations and alternative methods.

    python -m benchmarks.steerability [--quick] [--json FILE] [--markdown FILE] [--run runs/study]
    python -m benchmarks.steerability --page-only [--json FILE] [--markdown FILE]

Needs a finished run: its prompts, reward scales and, for comparison, its value models. Measurements are stored in the
run's folder: the same command resumes one that was killed. Writes docs/figures/steerability.json and a part of
docs/results.md; --quick writes no page, and figures to --json only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import command, figures
from jobs.arguments import refusing

if TYPE_CHECKING:
    from benchmarks.steerability.fronts import Steerability


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    weights: tuple[float, ...]  # of the first objective of a pair
    prompts: int
    samples: dict[str, int]  # answers per prompt and weight, by method (default: one)


# Spearman correlations over six means change with every swap of two: MATO, which they judge, gets more answers.
FULL = Scale((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 48, {"MATO": 4})
QUICK = Scale((0.0, 0.5, 1.0), 8, {})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steerability", description="Measure steering by preferences."
    )
    parser.add_argument("--quick", action="store_true", help="rough figures in four minutes instead of an hour")
    command.add_json(parser, "steerability")
    command.add_page(parser, "preferences")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/study"), help="folder of a finished run (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    file = arguments.json or figures.default_file("steerability")
    if arguments.page_only:
        found = refusing(lambda: figures.read(file))
    else:
        measured = refusing(lambda: run(arguments.run, QUICK if arguments.quick else FULL))
        found = {**measured.to_json(), **figures.provenance(command.line("steerability", argv))}
        if arguments.json or not arguments.quick:
            figures.write(file, found)
    from benchmarks.common.markdown import write_part
    from benchmarks.steerability.page import render

    page = render(found)
    if arguments.page_only or not arguments.quick:
        write_part(arguments.markdown, "words", page)
    print(page)


def run(folder: Path, scale: Scale) -> Steerability:
    from benchmarks.common import workload
    from benchmarks.steerability import answers, fronts

    config, store = workload.open_run(folder)
    return fronts.summarise(answers.measure(config, store, scale.weights, scale.prompts, scale.samples))


if __name__ == "__main__":
    main()
