"""Command line and output of the benchmarks. Loads no torch: --help is instant."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mavis_dist.environment  # noqa: F401  the same OpenMP waiting as in the actors
from benchmarks.common import figures
from mavis_dist.tables import text_table

if TYPE_CHECKING:
    from mavis_dist.config import Config

Scale = TypeVar("Scale")


def run(
    name: str,
    purpose: str,
    durations: str,
    scales: tuple[Scale, Scale],
    measure: Callable[[Path, Scale], dict[str, Any]],
    argv: Sequence[str] | None,
) -> None:
    """Measure at the quick or the full one of `scales` and write the file of figures."""
    arguments = make_parser(name, purpose, durations).parse_args(argv)
    record(name, arguments, lambda: measure(arguments.run, scales[0] if arguments.quick else scales[1]), argv)


def make_parser(name: str, purpose: str, durations: str) -> argparse.ArgumentParser:
    """The options that benchmarks of a finished run have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=purpose)
    parser.add_argument("--quick", action="store_true", help=f"rough figures in {durations}; written to --json only")
    add_json(parser, name)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run (default: %(default)s)"
    )
    return parser


def record(
    name: str, arguments: argparse.Namespace, measure: Callable[[], dict[str, Any]], argv: Sequence[str] | None
) -> None:
    """Measure and write the file of figures, with --quick only if it is named.

    A run that cannot be used ends the process with one line and exit code 2.
    """
    from jobs.arguments import refusing  # here: needs packages that commands without a run do without

    results = refusing(measure)
    if arguments.json or not arguments.quick:
        figures.write(file_of(name, arguments), {**results, **figures.provenance(line(name, argv))})


def of_config(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    file: Path,
    measure: Callable[[Config], Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """With --page-only the figures of `file`; otherwise those of the config that is named, which are written to it."""
    from jobs.arguments import refusing  # here: both need packages that commands without a config do without
    from mavis_dist import config as config_module

    if arguments.page_only:
        return refusing(lambda: figures.read(file))
    if arguments.config is None:
        parser.error("--config is required, except with --page-only")
    config = refusing(lambda: config_module.load(arguments.config, arguments.overrides))
    measured = refusing(lambda: measure(config))
    found = {**measured, **figures.provenance(f"{parser.prog} {_quoted(argv)}".strip())}
    figures.write(file, found)
    return found


def file_of(name: str, arguments: argparse.Namespace) -> Path:
    """The file of figures that the command line names, or the default one."""
    return arguments.json or figures.default_file(name)


def line(name: str, argv: Sequence[str] | None) -> str:
    """The command line, as a shell takes it."""
    return f"python -m benchmarks.{name} {_quoted(argv)}".strip()


def _quoted(argv: Sequence[str] | None) -> str:
    return shlex.join(sys.argv[1:] if argv is None else argv)


def words(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list; none of an empty text."""
    return tuple(filter(None, text.split(",")))


def add_config(parser: argparse.ArgumentParser, job: str) -> None:
    """The config of commands that have --page-only, and settings that replace its own."""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file, as for {job} (required to measure)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")


def add_json(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"file of all figures (default: docs/figures/{name}.json)"
    )


def add_page(parser: argparse.ArgumentParser, part: str) -> None:
    """Options of the commands that write a part of docs/results.md."""
    parser.add_argument(
        "--markdown",
        type=Path,
        default=figures.DOCS / "results.md",
        metavar="FILE",
        help=f"page with the part about {part} (default: docs/results.md)",
    )
    add_page_only(parser)


def add_page_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--page-only", action="store_true", help="measure nothing: write the page from the file of figures"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Names in the first column, figures right-aligned in the others."""
    cells = [list(head), *([format_figure(figure) for figure in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return text_table(cells[0], cells[1:], [first, *(width + 2 for width in others)])


def headline_table(headline: Mapping[str, Any]) -> str:
    width = max(map(len, headline), default=0)
    return "\n".join(f"{key:<{width}}  {format_figure(figure)}" for key, figure in headline.items())


def format_figure(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return ", ".join(f"{key} {format_figure(part)}" for key, part in figure.items())
    if isinstance(figure, (list, tuple)):
        return ", ".join(map(format_figure, figure))
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


def say(text: str) -> None:
    print(f"{text}\n", flush=True)


def say_conditions(conditions: Mapping[str, Any]) -> None:
    say(f"{headline_table(conditions)}\n\nOther load on these cores distorts the figures and makes the ratios rough.")
