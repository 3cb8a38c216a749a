"""Steering inside vLLM, and vLLM under this project's engine, beside the built-in engine. In vLLM's environment:

    .peers/vllm/bin/python -m benchmarks.vllm --run runs/quickstart [--minutes 30] [--parts speed,answers]

Writes docs/figures/vllm.json and its part of docs/vllm.md. Parts that are not measured keep their figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.common import command, figures
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table, write_part
from mavis_dist.types import UserError

NAME = "vllm"
PAGE = figures.DOCS / "vllm.md"
PARTS = ("answers", "speed", "load")
LABELS = {
    "built_in": "this project's engine",
    "vllm": "vLLM, not compiled",
    "compiled": "vLLM, compiled",
    "rows": "this project's engine over vLLM (`base.engine: vllm`), not compiled",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.make_parser(NAME, "Measure steering inside vLLM.", "3 minutes")
    parser.add_argument("--minutes", type=float, default=30.0, help="of mixed load (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s)")
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)
    file = command.file_of(NAME, arguments)
    if not arguments.page_only:
        command.record(NAME, arguments, lambda: measured(arguments, command.line(NAME, argv)), argv)
    if file.exists():
        write_part(PAGE, NAME, render(figures.read(file)))


def measured(arguments: argparse.Namespace, line: str) -> dict[str, Any]:
    """The figures of the parts that are named, each with its command line, and those known of the others."""
    from benchmarks.vllm import measure
    from benchmarks.vllm.contenders import Work

    parts = [part.strip() for part in arguments.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    with suppress(UserError):
        found = figures.read(command.file_of(NAME, arguments))
    with Work.of_run(arguments.run) as work:
        found |= {"model": work.model, "objectives": list(work.objectives), "value_layers": work.layers}
        found["commands"] = {**found.get("commands", {}), **dict.fromkeys(parts, line)}
        if "answers" in parts:
            found["answers"] = measure.answers(work)
        if "speed" in parts:
            found["speed"] = measure.speed(work, arguments.quick)
        if "load" in parts:
            found["load"] = measure.load(work, arguments.minutes)
    return found


def render(found: Mapping[str, Any]) -> str:
    measured_by = " and ".join(f"`{line}`" for line in dict.fromkeys(found["commands"].values()))
    parts = [
        f"Measured by {measured_by} with {found['model']}, two value models of {found['value_layers']} layers "
        f"({' and '.join(found['objectives'])}) and 2 threads; vLLM for "
        f"processors. {machine_line(found)}."
    ]
    if (speed := found.get("speed")) is not None:
        counts = list(next(iter(speed["tokens_per_s"].values())))
        rows = [
            [f"{LABELS[name.partition(' ')[0]]}: {name.partition(' ')[2]}", *(f"{per_s[c]:.0f}" for c in counts)]
            for name, per_s in speed["tokens_per_s"].items()
        ]
        parts += [
            f"Tokens per second at so many requests of {speed['tokens']} tokens each, in bfloat16, medians of "
            f"{speed['repetitions']} in turn; steered: scorer `lazy`, beta {speed['beta']:g}, half and half.",
            table(["", *counts], rows),
            "Where `Steering` is loaded, plain requests run at "
            f"{speed['plain_with_processor']['compiled']:.3f} of their speed without it (16 requests, compiled).",
        ]
    if (answers := found.get("answers")) is not None:
        parts.append(
            f"In float32, {answers['greedy_equal']} of {answers['greedy']} greedy and {answers['sampled_equal']} of "
            f"{answers['sampled']} sampled answers of {answers['tokens']} tokens are those of the built-in engine; "
            f"over {answers['steps']} steps of the scorer `full` the largest difference of a probability is "
            f"{answers['largest_difference']:.1e}."
        )
    if (load := found.get("load")) is not None:
        parts.append(
            f"{load['minutes']:.0f} minutes of mixed load (plain and steered requests, several answers, some aborted; "
            f"{load['requests']} requests; a cache of {load['cache_tokens']} tokens): memory "
            f"{', '.join(f'{mib:.0f}' for mib in load['mib'])} MiB, the medians of every tenth of the time; rows that "
            f"value models still followed: {load['rows_left']}."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
