"""Pieces of Markdown, and pages that several commands write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mavis_dist.evaluate.sweep import Estimate


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]".replace("-", "−")


def write_part(file: Path, name: str, text: str) -> None:
    """Put `text` in the place of a page's part of this name, at the end if it has none; the other parts stay."""
    first, last = f"<!-- part: {name} -->", f"<!-- end of part: {name} -->"
    part = f"{first}\n\n{text.strip()}\n\n{last}\n"
    page = file.read_text() if file.exists() else ""
    before, found, rest = page.partition(first)
    if found:
        _, found, after = rest.partition(f"{last}\n")
        if not found:
            raise ValueError(f"{file} has no line {last!r}: restore it, or remove the part's first line")
        page = before + part + after
    else:
        page = f"{page.rstrip()}\n\n{part}".lstrip()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)
