"""The page about architectures is what its command writes, and none that it calls right has wrong values."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.common import figures
from benchmarks.common.markdown import write_part
from benchmarks.models.__main__ import PAGE, render
from benchmarks.models.architectures import NAMES
from benchmarks.models.measure import RIGHT

FOUND = figures.read(figures.default_file("models"))


def test_the_page_is_rendered_from_its_figures(tmp_path) -> None:
    copy = tmp_path / "models.md"
    copy.write_text(PAGE.read_text())
    write_part(copy, "architectures", render(FOUND))
    assert copy.read_text() == PAGE.read_text()


def test_all_architectures_of_this_version_are_on_the_page() -> None:
    if FOUND["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the page was written with another version")
    assert sorted(FOUND["architectures"]) == sorted(NAMES)


def test_what_the_page_calls_right_is_right() -> None:
    right = {name: entry for name, entry in FOUND["architectures"].items() if entry["outcome"] == RIGHT}
    assert len(right) > 80
    assert all(entry["packed"] < 1e-4 and entry["decoded"] < 1e-4 for entry in right.values())
    assert [name for name, entry in right.items() if not (entry["guided"] and entry["fitted"])] == []
