"""A whole comparison on a tiny model: computed by actors, resumed, and repeated from stored answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import arguments, evaluate
from mavis_dist.compare import run as run_module
from mavis_dist.compare.run import compare
from mavis_dist.config import Config, load
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from tests import tiny

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"strengths": [1]},
    "mato": {"strengths": [2]},
    "best_of_n": {"strengths": [2, 4]},
    "best_of_n_value": {"strengths": [2]},
    "sir": {"strengths": [1], "n": 4},
    "mavis": {"strengths": [1, 4]},
    "mavis_best_of_2": {"strengths": [2]},
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny.write_models(folder, "run", ("vowels", "brief"))
    settings = {
        "run": "run",
        "storage": str(folder / "runs"),
        "objectives": {
            "vowels": {"reward": "function", "path": "tests.tiny:count_vowels"},
            "brief": {"reward": "brevity"},
        },
        "base": {"model": str(folder / tiny.MODEL), "dtype": "float32"},
        "prompts": {"train": 4, "validation": 1, "evaluation": 8},
        "rollout": {"max_tokens": 12, "cpus_per_actor": 1},
        "value": {"layers": 1},
        "evaluate": {"limit_answers": 16},
        "compare": {
            "methods": METHODS,
            "weights": 3,
            "seeds": 2,
            "kl": 0.5,
            "preferences": {"vowels": "Use many vowels."},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(config_file: Path, ray_address: str) -> Config:
    """The config of a comparison that has been computed."""
    config = load(config_file)
    compare(config)
    return config


def files(store: Store) -> dict[str, bytes]:
    folder = layout.cell_file("").rpartition("/")[0]
    return {name: store.read_bytes(f"{folder}/{name}") for name in store.list(folder)}


def test_every_cell_is_stored_and_everything_is_written(finished: Config) -> None:
    store = Store(finished.storage, finished.run)
    assert len(files(store)) == 2 * (1 + 3 * (1 + 1 + 2 + 1 + 1 + 2 + 1))
    figures = store.read_json(layout.COMPARISON_FILE)
    assert set(figures["hypervolume_ratio"]) == {"base", *METHODS} - {"mavis"}
    assert figures["share_of_limit"].keys() == figures["cost"].keys() == {"base", *METHODS}
    page = store.read_bytes(layout.COMPARISON_REPORT).decode()
    assert all(method in page for method in METHODS)
    for name in ("front-vowels-brief", "gain-by-divergence", "cost"):
        assert store.read_bytes(layout.comparison_plot(name, "svg")).startswith(b"<svg")
        assert store.read_bytes(layout.comparison_plot(name, "png")).startswith(b"\x89PNG")


def test_tables_come_from_stored_answers_without_a_cluster(
    finished: Config,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, "compute", lambda *_: pytest.fail("nothing is left to compute"))
    before = Store(finished.storage, finished.run).read_json(layout.COMPARISON_FILE)
    evaluate.run(load(config_file), tmp_path / "figures" / "comparison.json")
    assert json.loads((tmp_path / "figures" / "comparison.json").read_text()) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-2]] == ["base", *METHODS]


def test_a_file_of_answers_gives_the_same_figures_without_the_run(
    finished: Config, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "compute", lambda *_: pytest.fail("nothing is left to compute"))
    before, _ = compare(load(config_file), answers=tmp_path / "answers.parquet")
    elsewhere = [f"storage={tmp_path / 'elsewhere'}", "base.model=/no/such/model"]
    after, page = compare(load(config_file, elsewhere), sources=[tmp_path / "answers.parquet"])
    assert after.to_json() == before.to_json()
    assert Path(page).is_file()


def test_lost_cells_and_new_ones_are_computed_and_no_others(finished: Config, config_file: Path) -> None:
    store = Store(finished.storage, finished.run)
    before = files(store)
    lost = next(name for name in before if name.startswith("mavis-"))
    path = Path(store.root) / layout.cell_file("").rpartition("/")[0]
    stamps = {name: (path / name).stat().st_mtime_ns for name in before if name != lost}
    (path / lost).unlink()
    compare(load(config_file, ["compare.methods.mato.strengths=[1, 2]"]))
    after = files(store)
    assert len(after) == len(before) + 2 * 3
    assert {name: (path / name).stat().st_mtime_ns for name in stamps} == stamps
    assert lost in after


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.methods=[base]"], ["'compare.methods'", "add one"]),
        (["compare.methods=[mavs]"], ["'compare.methods.mavs'", "mavis"]),
        (["compare.preferences={}"], ["compare.methods.prompt", "'vowels' has no preference"]),
        (["evaluate.limit_answers=0"], ["'evaluate.limit_answers' is 0", "64"]),
        (["run=elsewhere"], ["'elsewhere' has no value model of 'vowels'", "jobs.pipeline"]),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_computed(
    finished: Config,
    config_file: Path,
    overrides: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, "compute", lambda *_: pytest.fail("this should have been refused"))
    with pytest.raises(SystemExit) as end:
        arguments.refusing(lambda: compare(load(config_file, overrides)))
    assert end.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
