"""Tables as plain text. Loads nothing, so that every command can print one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> str:
    """One line per row below a ruled head; the first column is aligned left, the others right.

    `widths` are in characters, one per column; a longer cell moves the rest of its line to the right.
    """

    def line(cells: Sequence[str]) -> str:
        figures = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"{cells[0]:<{widths[0]}}" + "".join(figures)

    return "\n".join([line(head), "-" * len(line(head)), *map(line, rows)])
