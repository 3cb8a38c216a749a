"""What iterations and variants of the training bring: trains all of them, measures them alike, writes one page.

    python -m benchmarks.study --config jobs/configs/study.yaml [--json FILE] [--markdown FILE] [dotted.key=value ...]

Whatever is finished is skipped: a study that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mavis_dist.environment  # noqa: F401  threads wait as they do in the actors
from benchmarks.common.command import add_outputs, write_json
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
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, as of jobs.pipeline")
    add_outputs(parser, "iterations and variants")
    parser.add_argument(
        "--betas",
        type=_betas,
        default="1,3,6,12",
        metavar="A,B,...",
        help="strengths to measure, iteration 0 at the middle one sets the KL to compare at (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_args(argv)
    command = f"python -m benchmarks.study {shlex.join(sys.argv[1:] if argv is None else argv)}"
    config = refusing(lambda: config_module.load(arguments.config, arguments.overrides))
    results, page = refusing(lambda: run(config, arguments.betas, command))
    write_part(arguments.markdown, "study", page)
    if arguments.json:
        write_json(arguments.json, results.to_json())
    print(page)


def run(config: Config, betas: Sequence[float], command: str) -> tuple[Results, str]:
    """Train and measure; returns the figures and the page about them."""
    from benchmarks.study.measure import measure
    from benchmarks.study.page import render
    from benchmarks.study.variants import VARIANTS, train
    from mavis_dist import cluster, pipeline

    variants = [variant for variant in VARIANTS if variant.is_new(config)]
    cluster.connect()
    pipeline.run(config)
    for variant in variants:
        train(config, variant)
    results = measure(config, variants, betas, command)
    return results, render(results)


def _betas(text: str) -> tuple[float, ...]:
    """Ascending strengths from a list with commas."""
    try:
        betas = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,3,6,12") from None
    if not all(0 < beta < float("inf") for beta in betas):
        raise argparse.ArgumentTypeError(f"{text!r} must hold finite numbers above 0 only")
    return betas


if __name__ == "__main__":
    main()
