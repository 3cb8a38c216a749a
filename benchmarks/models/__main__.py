"""Which architectures work: each that transformers has, tiny and random, through all that is done with models.

    python -m benchmarks.models [--json FILE]

Trees are grown by the decoder, values of the packed tree and of decoding are compared with transformers' own pass over
every path, one step of a fit is taken, and an answer is guided. Windows and chunks are shorter than the texts.
Prints a line per architecture, writes all figures to docs/figures/models.json and the tables to docs/models.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import command, figures
from benchmarks.common.command import say
from benchmarks.common.markdown import table, write_part

PAGE = figures.DOCS / "models.md"
NAMES_OF_LAYERS = {"full_attention": "full", "sliding_attention": "window", "chunked_attention": "chunk"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="Try every architecture.")
    command.add_json(parser, "models")
    file = command.file_of("models", parser.parse_args(argv))
    figures.write(file, {"architectures": measure_all(), **figures.provenance(command.line("models", argv))})
    write_part(PAGE, "architectures", render(figures.read(file)))


def measure_all() -> dict[str, dict[str, Any]]:
    import torch

    from benchmarks.models.architectures import NAMES
    from benchmarks.models.measure import measure

    torch.set_num_threads(1)  # the models are tiny
    found = {}
    for name in NAMES:
        found[name] = measure(name)
        say(f"{name}: {found[name]['outcome']}")
    return found


def render(found: Mapping[str, Any]) -> str:
    """The tables of the page."""
    entries: Mapping[str, Mapping[str, Any]] = found["architectures"]
    by_outcome = {
        outcome: {name: entry for name, entry in entries.items() if entry["outcome"] == outcome}
        for outcome in ("right", "refused", "not built tiny")
    }
    right, refused, unknown = by_outcome.values()
    head = ["architecture", "attention", "layers", "packed tree", "decoding"]
    rows = [[f"`{name}`", entry["attention"], layers(entry), *errors(entry)] for name, entry in right.items()]
    return "\n\n".join(
        [
            f"### Right: {len(right)}",
            table(head, rows),
            f"### Refused: {len(refused)}",
            table(["architecture", "because"], [[f"`{name}`", because(entry)] for name, entry in refused.items()]),
            f"### Not tried: {len(unknown)}",
            "Their configurations do not take the small sizes used here, or need packages that are not installed. They "
            "are tried on their own weights when they are loaded, like any model.",
            ", ".join(f"`{name}`" for name in unknown),
            f"`{found['command']}`: {figures.machine_line(found)}.",
        ]
    )


def layers(entry: Mapping[str, Any]) -> str:
    return ", ".join(NAMES_OF_LAYERS[kind] for kind in entry["layers"])


def errors(entry: Mapping[str, Any]) -> list[str]:
    return [f"{entry[key]:.0e}" for key in ("packed", "decoded")]


def because(entry: Mapping[str, Any]) -> str:
    """The reason within the refusal, without the remedy."""
    return entry["reason"].partition("(")[2].rpartition("): use")[0].replace("|", "\\|")


if __name__ == "__main__":
    main()
