"""What the service does when it is treated badly, over real HTTP, with a tiny random model.

    python -m benchmarks.chaos [--parts kills,fuzz,soak] [--quick] [--json FILE] [--kills N] [--requests N]
                               [--minutes N] [--seed N]

- kills: replicas, gateway, controller, proxy and machines are killed while clients read streams. A stream has to end
  with the very text it would have had, or visibly not to end.
- fuzz: requests made up from the service's description and from its steering fields. None may be answered by a
  failure of ours, or by what the description does not allow.
- soak: a mixture of requests for a long time. No process may grow, and in the end nothing may be held.

Ends with exit code 1 where a part says so. Every part writes its own part of docs/reliability.md.
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
from benchmarks.common.command import say, write_json
from jobs.arguments import refusing

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
# A module with measure, page and two scales, and the field of a scale that the command line may change.
PARTS = {
    "kills": ("benchmarks.chaos.kills", "kills"),
    "fuzz": ("benchmarks.chaos.fuzz", "requests"),
    "soak": ("benchmarks.chaos.soak", "minutes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Treat the service badly.")
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a little of each in minutes; no page is written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every number is written")
    parser.add_argument("--kills", type=int, help="how many (default: 200)")
    parser.add_argument("--requests", type=int, help="fuzzed ones, at least (default: 2000)")
    parser.add_argument("--minutes", type=float, help="of soak (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of victims, pauses and requests (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = {part: refusing(lambda part=part: run(part, arguments)) for part in arguments.parts}  # type: ignore[misc]
    if arguments.json:
        write_json(arguments.json, results)
    failed = [part for part, figures in results.items() if not figures["is_kept"]]
    if failed:
        say(f"failed: {', '.join(failed)}")
        sys.exit(1)


def run(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part, which are on the page when this returns."""
    from benchmarks.common.markdown import write_part

    name, field = PARTS[part]
    module = import_module(name)
    scale = module.QUICK if arguments.quick else module.FULL
    given = getattr(arguments, field)
    figures = module.measure(scale if given is None else replace(scale, **{field: given}), arguments.seed)
    if not arguments.quick:
        write_part(PAGE, part, module.page(figures))
    return figures


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = set(parts) - PARTS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    main()
