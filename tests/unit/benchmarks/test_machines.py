"""A measurement of runs on several machines goes on where it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.machines import __main__ as machines
from benchmarks.machines.scenarios import scenarios
from mavis_dist.store.files import Store

FAILS_AT = 5


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of all runs, of which one fails; those that are disturbed by a drain have results of their own."""
    names: list[str] = []

    def run(config: Path, name: str, nodes: int, scenario: Any = None) -> tuple[Store, float, list[str]]:
        names.append(name)
        if len(names) == FAILS_AT:
            raise RuntimeError(name)
        store = Store(str(tmp_path), name)
        is_other = scenario is not None and scenario.name.startswith("drained")
        store.write_json("eval/sweep/sweep.json", {"is_other": is_other})
        store.write_json("stages.json", [])
        return store, float(len(names)), []

    monkeypatch.setattr(machines, "run", run)
    monkeypatch.setattr(machines, "has_redis", lambda: True)
    return names


def test_the_same_command_continues_one_that_failed(begun: list[str], tmp_path: Path) -> None:
    unfinished = tmp_path / "figures.json"
    with pytest.raises(RuntimeError):
        machines.measure(None, "", unfinished)
    found = machines.measure(None, "", unfinished)
    assert begun[FAILS_AT] == begun[FAILS_AT - 1], "goes on with the one that failed"
    assert len(begun) == len(machines.TIMED) + len(scenarios()) + 1
    assert found["same_on_all_counts"]
    assert [one["name"] for one in found["scenarios"]] == [scenario.name for scenario in scenarios()]
    assert [one["name"] for one in found["scenarios"] if not one["same"]] == ["drained: training"]
    assert machines.measure(None, "", unfinished) == found
    assert len(machines.measure("another", "three join", unfinished)["scenarios"]) == 1


def test_single_scenarios_count_for_the_whole(
    begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "PAGE", tmp_path / "page.md")
    file = tmp_path / "figures.json"
    begun.extend(["earlier"] * FAILS_AT)  # none fails
    machines.main(["--only", "lost", "--json", str(file)])
    assert not file.exists()
    alone = len(begun)
    machines.main(["--json", str(file)])
    assert len(begun) - alone == len([one for one in scenarios() if not one.name.startswith("lost")])
    assert "| drained: training | other results |" in (tmp_path / "page.md").read_text()
    assert [path.name for path in tmp_path.glob("*.json")] == ["figures.json"]
