"""Progress lines on stderr."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mavis_dist.progress import metered


@dataclass
class Result:
    key: str
    num_tokens: int


def test_metered_passes_all_results_and_counts_a_repeated_one_once(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result("a", 3), Result("a", 3), Result("b", 4)]
    assert list(metered(results, "grow", "trees", total=2)) == results
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("grow                     2/2 trees, ")
    assert "tokens/s" not in line


def test_metered_shows_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    list(metered([Result("a", 3)], "grow", "trees", total=1, with_speed=True))
    assert capsys.readouterr().err.rstrip().endswith("tokens/s")


def test_no_results_print_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(metered([], "grow", "trees", total=0)) == []
    assert capsys.readouterr().err == ""
