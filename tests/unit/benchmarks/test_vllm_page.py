"""The page shows the figures that are stored."""

from __future__ import annotations

from benchmarks.common import figures
from benchmarks.vllm import __main__ as vllm


def test_the_page_is_rendered_from_the_stored_figures() -> None:
    assert vllm.render(figures.read(figures.default_file(vllm.NAME))).strip() in vllm.PAGE.read_text()
