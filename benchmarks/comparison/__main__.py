"""Value-guided decoding beside its alternatives: runs the comparison of a config, and writes one page about it.

    python -m benchmarks.comparison --config jobs/configs/comparison.yaml [--json FILE] [--markdown FILE]
    python -m benchmarks.comparison --page-only [--json FILE] [--markdown FILE]

The run and its policies have to be trained before (docs/evaluation.md). Stored answers are not computed again: the same
command resumes a comparison that was killed. Plots are written beside the file of figures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures
from benchmarks.common.markdown import write_part
from jobs.arguments import add_answers
from mavis_dist.config import Config

if TYPE_CHECKING:
    from mavis_dist.compare.results import Comparison

NAME = "comparison"  # of the file of figures, of the page and of its part


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description="Compare value-guided decoding with its alternatives, and write one page about it.",
    )
    command.add_config(parser, "jobs.evaluate")
    command.add_json(parser, NAME)
    parser.add_argument(
        "--markdown",
        type=Path,
        default=figures.DOCS / f"{NAME}.md",
        metavar="FILE",
        help="page with the part about the comparison (default: docs/comparison.md)",
    )
    add_answers(parser)
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)
    file = arguments.json or figures.default_file(NAME)

    def measure(config: Config) -> dict[str, Any]:
        return run(config, arguments.answers, arguments.sources).to_json()

    found = command.of_config(parser, arguments, file, measure, argv)
    write_page(found, file, arguments.markdown)


def run(config: Config, answers: Path | None = None, sources: Sequence[Path] = ()) -> Comparison:
    """All figures; raises UserError before anything is computed, naming what is missing."""
    from mavis_dist.compare.run import compare

    return compare(config, answers, sources)[0]


def write_page(found: Mapping[str, Any], file: Path, markdown: Path) -> None:
    """Draw the plots beside the file of figures, and write the part of the page that shows them."""
    from benchmarks.comparison import page
    from mavis_dist.compare.plots import drawings
    from mavis_dist.compare.results import Comparison

    comparison = figures.parse(Comparison, found)
    images = {}
    for drawing in drawings(comparison):
        image = file.with_name(f"{file.stem}-{drawing.name}.svg")
        image.write_bytes(drawing.svg_file)
        images[drawing] = os.path.relpath(image, markdown.parent)
    text = page.render(comparison, found, images)
    write_part(markdown, NAME, text)
    print(text)


if __name__ == "__main__":
    main()
