"""The service under faults, malformed requests and long load, over real HTTP, with a tiny random model.

    python -m benchmarks.chaos [--parts kills,fuzz,soak] [--quick] [--json FILE] [--page-only] [--kills N]
                               [--requests N] [--minutes N] [--seed N]

- kills: processes and Ray nodes are killed while clients read streams. Every stream must end with the text that it
  would have had without the kill, or fail visibly.
- fuzz: requests generated from the service's OpenAPI description and from its steering fields. No response may be a
  5xx, and every response must match the description.
- soak: mixed requests for a long time. No process may grow, and in the end no row or cached token may be held.

Exits with code 1 if a part fails. Writes docs/figures/chaos-PART.json (or all parts to --json), and a part of
docs/reliability.md from each; --quick writes no page, and figures to --json only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mavis_dist.environment  # noqa: F401  ray reads it
from benchmarks.common import command, figures
from jobs.arguments import refusing
from mavis_dist.types import UserError

PAGE = figures.DOCS / "reliability.md"
# A module with measure, page and two scales, and the field of the scale that the command line can replace.
PARTS = {
    "kills": ("benchmarks.chaos.kills", "kills"),
    "fuzz": ("benchmarks.chaos.fuzz", "requests"),
    "soak": ("benchmarks.chaos.soak", "minutes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description="Test the service under faults, malformed requests and long load.",
    )
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes; writes no page, and figures to --json only"
    )
    command.add_json(parser, "chaos-PART")
    command.add_page_only(parser)
    parser.add_argument("--kills", type=int, help="number of kills (default: 200)")
    parser.add_argument("--requests", type=int, help="minimum number of fuzzed requests (default: 2000)")
    parser.add_argument("--minutes", type=float, help="length of the soak (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of kills, pauses and requests (default: %(default)s)")
    arguments = parser.parse_args(argv)
    line = command.line("chaos", argv)
    results: dict[str, dict[str, Any]] = {}
    for part in arguments.parts:
        results[part] = refusing(lambda part=part: figures_of(part, arguments, line))  # type: ignore[misc]
        if not arguments.page_only:
            save(part, results, arguments)
        if arguments.page_only or not arguments.quick:
            write_page(part, results[part])
    failed = [part for part, found in results.items() if not found["is_kept"]]
    if failed:
        command.say(f"failed: {', '.join(failed)}")
        sys.exit(1)


def figures_of(part: str, arguments: argparse.Namespace, line: str) -> dict[str, Any]:
    """The figures of one part, measured or, with --page-only, read."""
    if arguments.page_only:
        found = figures.read(arguments.json) if arguments.json else {part: figures.read(_file(part))}
        if part not in found:
            raise UserError(f"{arguments.json} has no part {part}: choose with --parts from {', '.join(found)}")
        return found[part]
    name, field = PARTS[part]
    module = import_module(name)
    scale, given = module.QUICK if arguments.quick else module.FULL, getattr(arguments, field)
    measured = module.measure(scale if given is None else replace(scale, **{field: given}), arguments.seed)
    return {**measured, **figures.provenance(line)}


def save(part: str, results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write all parts so far to --json, or the last one to its own file."""
    if arguments.json:
        figures.write(arguments.json, results)
    elif not arguments.quick:
        figures.write(_file(part), results[part])


def write_page(part: str, found: dict[str, Any]) -> None:
    from benchmarks.common.markdown import write_part

    write_part(PAGE, part, import_module(PARTS[part][0]).page(found))


def _file(part: str) -> Path:
    return figures.default_file(f"chaos-{part}")


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = set(parts) - PARTS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    main()
