"""Markdown tables, and pages of which several commands write one part each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # needs packages that not every page does
    from mavis_dist.evaluate.sweep import Estimate


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return minus(f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]")


def minus(text: str) -> str:
    """A formatted number with a typographic minus sign."""
    return text.replace("-", "−")


def listed(names: Sequence[str]) -> str:
    """Names in parentheses behind their count; empty if there are none."""
    return f" ({'; '.join(names)})" if names else ""


def write_part(file: Path, name: str, text: str) -> None:
    """Replace the part of a page with this name, or append it; the other parts stay.

    Raises:
        ValueError: the end marker of the part is missing.
    """
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
