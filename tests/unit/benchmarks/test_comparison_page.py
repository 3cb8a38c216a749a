"""The published page of a comparison, from a made-up one whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.comparison import __main__ as command
from benchmarks.comparison.page import findings, is_one_answer
from mavis_dist.compare.figures import summarise
from mavis_dist.compare.results import Comparison, TrainingCost
from tests.unit.compare.made_up import made_up

METHODS = ["base", "mavis", "weak", "short", "unknown"]
PROVENANCE = {
    "command": "python -m benchmarks.comparison --config FILE",
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 24, "gpus": []},
    "versions": {"python": "3.11", "torch": "2"},
}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return summarise(
        made_up(),
        dict.fromkeys(METHODS, TrainingCost(60.0, 20.0, 9000, 3000, ["a GPU"])),
        {"base model": "tiny", "versions": "many"},
    )


def test_the_page_is_rendered_from_the_file_of_figures(comparison: Comparison, tmp_path: Path) -> None:
    file, page = tmp_path / "figures" / "comparison.json", tmp_path / "comparison.md"
    file.parent.mkdir()
    file.write_text(json.dumps({**comparison.to_json(), **PROVENANCE}))
    page.write_text("# By hand\n")
    command.main(["--page-only", "--json", str(file), "--markdown", str(page)])
    text = page.read_text()
    assert text.startswith("# By hand\n")
    assert PROVENANCE["command"] in text
    assert "a processor" in text
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert rows.keys() >= set(METHODS)
    for name in ("front-a-b", "gain-by-divergence", "cost"):
        assert f"](figures/comparison-{name}.svg)" in text
        assert (file.parent / f"comparison-{name}.svg").read_bytes().startswith(b"<svg")
    command.main(["--page-only", "--json", str(file), "--markdown", str(page)])
    assert page.read_text() == text, "the part is replaced"


def test_findings_count_what_intervals_say(comparison: Comparison) -> None:
    gain, share, *_ = findings(comparison)
    assert gain.startswith("In weighted gain mavis is above 1 of 2 methods (weak), below 0")
    assert "not distinguished from 1 (short)" in gain
    assert share.startswith("In share of the limit mavis is above 1 of 2 methods (weak), below 1 (short)")


def test_methods_that_choose_among_answers_generate_more(comparison: Comparison) -> None:
    """The made-up ones generate 20 tokens for an answer of 10."""
    assert not any(is_one_answer(row) for row in comparison.methods)


def test_measuring_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "--config is required" in capsys.readouterr().err
