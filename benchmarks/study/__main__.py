"""Iterations and variants of the training: trains all of them, measures them alike, and writes one page.

    python -m benchmarks.study --config jobs/configs/study.yaml [--json FILE] [--markdown FILE] [dotted.key=value ...]
    python -m benchmarks.study --page-only [--json FILE] [--markdown FILE]

Finished stages and measurements are skipped: the same command resumes a study that was killed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.common import command, figures
from benchmarks.common.markdown import write_part
from jobs.arguments import refusing
from mavis_dist import config as config_module
from mavis_dist.config import Config

if TYPE_CHECKING:
    from benchmarks.study.figures import Results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description="Train and compare iterations and variants of the training."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, as for jobs.pipeline (required to measure)")
    command.add_json(parser, "study")
    command.add_page(parser, "iterations and variants")
    parser.add_argument(
        "--betas",
        type=_betas,
        default="1,3,6,12",
        metavar="A,B,...",
        help="strengths to measure; iteration 0 at the middle one sets the KL of the comparison (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_args(argv)
    file = arguments.json or figures.default_file("study")
    if arguments.page_only:
        found = refusing(lambda: figures.read(file))
    else:
        if arguments.config is None:
            parser.error("--config is required, except with --page-only")
        config = refusing(lambda: config_module.load(arguments.config, arguments.overrides))
        results = refusing(lambda: run(config, arguments.betas))
        found = {**results.to_json(), **figures.provenance(command.line("study", argv))}
        figures.write(file, found)
    from benchmarks.study.page import render

    page = render(found)
    write_part(arguments.markdown, "study", page)
    print(page)


def run(config: Config, betas: Sequence[float]) -> Results:
    """Train everything that is not finished, and measure it."""
    from benchmarks.study.measure import measure
    from benchmarks.study.variants import VARIANTS, train
    from mavis_dist import cluster, pipeline

    variants = [variant for variant in VARIANTS if variant.is_new(config)]
    cluster.connect()
    pipeline.run(config)
    for variant in variants:
        train(config, variant)
    return measure(config, variants, betas)


def _betas(text: str) -> tuple[float, ...]:
    """Strengths in ascending order, from a comma-separated list."""
    try:
        betas = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,3,6,12") from None
    if not all(0 < beta < float("inf") for beta in betas):
        raise argparse.ArgumentTypeError(f"{text!r} must contain only finite numbers above 0")
    return betas


if __name__ == "__main__":
    main()
