"""Decoding and training on a GPU, with random weights: needs no model files and no finished run.

    python -m benchmarks.device [--shapes 1b,7b] [--rows 1,16,64,256] [--tokens 128] [--json FILE]
    python -m benchmarks.device --page-only [--json FILE]

Prints a line per measurement, and writes all figures so far to docs/figures/device.json after each number of rows, so
that a run that is cut off is not lost. Without --json it writes its part of docs/benchmarks.md as well. The shape
`tiny` tries the command on a processor in seconds.

Runs where neither Ray, DeepSpeed nor the packages of the command lines are installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures
from benchmarks.common.command import headline_table, say
from mavis_dist.types import UserError

if TYPE_CHECKING:
    import torch

PAGE = figures.DOCS / "benchmarks.md"
TINY = "tiny"
MIN_TOKENS = 8  # of an answer: a tree needs some tokens on every layer


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    file = command.file_of("device", arguments)

    def save(found: Mapping[str, Any]) -> None:
        figures.write(file, {**headlines(found), **found, **figures.provenance(command.line("device", argv))})

    try:
        if not arguments.page_only:
            measure(arguments.shapes, arguments.rows, arguments.tokens, save)
        found = figures.read(file)
    except UserError as error:  # as `jobs.arguments.refusing`, which needs packages that may be missing here
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    say(headline_table(headlines(found)))
    if arguments.page_only or not arguments.json:
        write_page(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description="Measure a GPU.")
    parser.add_argument(
        "--shapes",
        type=_names,
        default=("1b", "7b"),
        help=f"of models, in this order: 1b, 7b, or {TINY}, which needs no GPU (default: 1b,7b)",
    )
    parser.add_argument(
        "--rows", type=_counts, default=(1, 16, 64, 256), help="answers at a time (default: 1,16,64,256)"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    command.add_json(parser, "device")
    command.add_page_only(parser)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def measure(shapes: Sequence[str], rows: Sequence[int], tokens: int, save: Callable[[Mapping[str, Any]], None]) -> None:
    """Measure every shape, and after the first one its training; `save` is given all figures so far, many times.

    Raises:
        UserError: an option cannot be used, or there is no GPU.
    """
    import torch

    from benchmarks.device import decoding, machine, models, training

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(shapes, rows, tokens, models.SHAPES, device)
    progress = Progress()
    rates = machine.measure(device)
    progress(f"reads {rates.read_bytes_per_s / 1e9:.0f} GB/s, multiplies {rates.matmul_flops_per_s / 1e12:.3g} TFLOP/s")
    found: dict[str, Any] = {
        "conditions": {"rows": list(rows), "tokens": tokens, "prompt_tokens": decoding.PROMPT_TOKENS},
        "read_gb_per_s": rates.read_bytes_per_s / 1e9,
        "matmul_tflops": rates.matmul_flops_per_s / 1e12,
        "shapes": {},
    }
    for name in shapes:
        shape = models.SHAPES[name]
        loaded = models.load(shape, device)
        progress(f"{name}: {shape.num_parameters / 1e9:.3g} billion parameters, weights are made")
        by_rows: dict[str, Any] = {}
        peaks: list[float] = []
        found["shapes"][name] = {"parameters": shape.num_parameters, "rows": by_rows}
        for count in rows:
            figure = decoding.measure(loaded, count, tokens, rates, progress.of(f"{name}, {count} rows"))
            by_rows[str(count)] = figure
            peaks.extend(figure["peak_gib"].values())
            found["shapes"][name]["peak_gib"] = max(peaks)
            save(found)
        del loaded
        machine.free(device)
        if name == shapes[0]:
            trained = training.measure(shape, tokens, device, progress.of(f"{name}, training"))
            found["training"] = {"shape": name, **trained}
            save(found)
            machine.free(device)


def check(
    shapes: Sequence[str], rows: Sequence[int], tokens: int, known: Mapping[str, Any], device: torch.device
) -> None:
    """Raises UserError if an option cannot be used, or if there is no GPU for a shape that needs one."""
    for name in shapes:
        if name not in known:
            raise UserError(f"--shapes: there is no shape {name!r}; use some of {', '.join(known)}")
        if device.type == "cpu" and name != TINY:
            raise UserError(f"--shapes: {name} needs a GPU, and torch finds none; --shapes {TINY} runs without one")
    if min(rows) < 1:
        raise UserError(f"--rows: {min(rows)} given; use integers >= 1")
    if tokens < MIN_TOKENS:
        raise UserError(f"--tokens: {tokens} given; use an integer >= {MIN_TOKENS}")


class Progress:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"{time.perf_counter() - self._started:6.1f} s  {line}", flush=True)

    def of(self, part: str) -> Callable[[str], None]:
        """Prints lines about a part of the work."""
        return lambda line: self(f"{part}, {line}")


def headlines(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Ratios by shape: of speeds, and of the least possible time of a step to the measured one."""
    ratios: dict[str, dict[str, float]] = {}
    for name, shape in found["shapes"].items():
        for rows, figure in shape["rows"].items():
            speed, step_ms = figure["tokens_per_s"], figure["step_ms"]
            for ratio, value in (
                ("engine_vs_hf", speed["unguided"] / speed["hf"]),
                ("roofline_fraction", figure["limit_ms"] / step_ms["unguided"]),
                ("lazy_vs_unguided", speed["lazy_2"] / speed["unguided"]),
                ("lazy_heads_vs_unguided", speed["lazy_2_heads"] / speed["unguided"]),
            ):
                ratios.setdefault(f"{ratio}_b{rows}", {})[name] = value
    trained = found.get("training")
    if trained:
        speed = trained["tokens_per_s"]
        for variant in speed.keys() - {"branches"}:
            ratios[f"{variant}_vs_branches"] = {trained["shape"]: speed[variant] / speed["branches"]}
    return dict(sorted(ratios.items(), key=lambda ratio: ratio[0].rpartition("_b")[0]))


def write_page(found: Mapping[str, Any]) -> None:
    from benchmarks.common.markdown import write_part
    from benchmarks.device.page import render

    page = render(found)
    write_part(PAGE, "device", page)
    print(page)


if __name__ == "__main__":
    main()
