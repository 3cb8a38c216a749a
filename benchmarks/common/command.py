"""The command line and the output that all benchmarks share. Loads no torch: --help is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mavis_dist.environment  # noqa: F401  threads wait as they do where the system runs
from jobs.arguments import refusing

Scale = TypeVar("Scale")


def run(
    name: str,
    purpose: str,
    durations: str,
    scales: tuple[Scale, Scale],
    measure: Callable[[Path, Scale], dict[str, Any]],
    argv: Sequence[str] | None,
) -> None:
    """Measure at the quick or the full one of `scales` and write what --json asks for.

    A run that cannot be used ends the process with one line and exit code 2.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=purpose)
    parser.add_argument("--quick", action="store_true", help=f"rough figures in {durations}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every number is written")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    results = refusing(lambda: measure(arguments.run, scales[0] if arguments.quick else scales[1]))
    if arguments.json:
        write_json(arguments.json, results)


def add_outputs(parser: argparse.ArgumentParser, part: str) -> None:
    """Options of the commands that write a part of the page of results."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every number is written")
    parser.add_argument(
        "--markdown",
        type=Path,
        default=Path("docs/results.md"),
        metavar="FILE",
        help=f"the page whose part about {part} is written (default: %(default)s)",
    )


def write_json(file: Path, figures: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]], first: int = 36, width: int = 12) -> str:
    """Names in the first column, figures to the right of them."""
    lines = ["".join([f"{head[0]:<{first}}", *(f"{name:>{width}}" for name in head[1:])])]
    lines.append("-" * len(lines[0]))
    lines += ["".join([f"{row[0]:<{first}}", *(f"{plain(x):>{width}}" for x in row[1:])]) for row in rows]
    return "\n".join(lines)


def headline_table(headline: Mapping[str, Any]) -> str:
    return "\n".join(f"{key:<44}{plain(figure)}" for key, figure in headline.items())


def plain(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in figure.items())
    return figure if isinstance(figure, str) else f"{figure:.4g}"


def say(text: str) -> None:
    print(f"{text}\n", file=sys.stdout, flush=True)
