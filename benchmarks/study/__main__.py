"""The share of the limit of steering: trains a run and variants of it, measures all alike, and writes one page.

    python -m benchmarks.study --config jobs/configs/study.yaml [--json FILE] [--markdown FILE] [dotted.key=value ...]
    python -m benchmarks.study --page-only [--json FILE] [--markdown FILE]

Finished stages and measurements are skipped: the same command resumes a study that was killed. A plot is written
beside the file of figures.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures
from benchmarks.common.markdown import write_part
from mavis_dist.config import Config

if TYPE_CHECKING:
    from benchmarks.study.figures import Results

NAME = "values"  # of the file of figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Train a run and variants of it, and measure their share of the limit of steering.",
    )
    command.add_config(parser, "jobs.pipeline")
    command.add_json(parser, NAME)
    command.add_page(parser, "the share of the limit")
    parser.add_argument(
        "--betas",
        type=_betas,
        default="1,2,4,8",
        metavar="A,B,...",
        help="strengths to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--kl", type=_nats, default="2", help="nats per answer at which gains are compared (default: %(default)s)"
    )
    parser.add_argument(
        "--variants",
        type=command.words,
        metavar="A,B,...",
        help="variants to train and measure, by name (default: all that differ from the config; '': none)",
    )
    arguments = parser.parse_args(argv)
    file = arguments.json or figures.default_file(NAME)

    def measure(config: Config) -> dict[str, Any]:
        return run(config, arguments.betas, arguments.kl, arguments.variants).to_json()

    found = command.of_config(parser, arguments, file, measure, argv)
    write_page(found, file.with_suffix(".svg"), arguments.markdown)


def write_page(found: Mapping[str, Any], image: Path, markdown: Path) -> None:
    """Draw the plot and write the part of the page that shows it."""
    from benchmarks.study import page, plot
    from benchmarks.study.figures import Results

    plot.write(figures.parse(Results, found), image)
    text = page.render(found, os.path.relpath(image, markdown.parent))
    write_part(markdown, "study", text)
    print(text)


def run(config: Config, betas: Sequence[float], kl: float, names: Sequence[str] | None = None) -> Results:
    """Train everything that is not finished, and measure it; `names` are those of the variants, None: all.

    Raises:
        UserError: for an unknown name, before anything is trained.
    """
    from benchmarks.study.measure import check, measure
    from benchmarks.study.variants import chosen, train
    from mavis_dist import cluster, pipeline

    check(config)
    variants = [variant for variant in chosen(names) if variant.changed(config)]
    cluster.connect()
    pipeline.run(config)
    for variant in variants:
        train(config, variant)
    return measure(config, variants, betas, kl)


def _betas(text: str) -> tuple[float, ...]:
    """Strengths in ascending order, from a comma-separated list."""
    try:
        betas = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,4,8") from None
    if not all(0 < beta < float("inf") for beta in betas):
        raise argparse.ArgumentTypeError(f"{text!r} must contain only finite numbers above 0")
    return betas


def _nats(text: str) -> float:
    try:
        nats = float(text)
    except ValueError:
        nats = math.nan
    if not 0 < nats < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number above 0, such as 2")
    return nats


if __name__ == "__main__":
    main()
