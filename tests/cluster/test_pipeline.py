"""The whole pipeline on real Ray, Ray Train and DeepSpeed with a tiny model: run, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from jobs import arguments
from mavis_dist import pipeline
from mavis_dist.config import load
from mavis_dist.evaluate import gate
from mavis_dist.models.value import ValueModelError
from mavis_dist.store import values
from mavis_dist.store.files import Store
from tests.cluster.jobs import hashes, run_here
from tests.tiny import write_base


def test_a_run_stores_and_publishes_everything(undisturbed: Store) -> None:
    decided = {name: gate.current(undisturbed, name, before=2) for name in ("brief", "vowels")}
    assert values.published(undisturbed) == decided
    assert len(hashes(undisturbed)) == 3 * 2 + 4 * 2 + 4 + 4 + (1 + 2) + 1
    page = undisturbed.read_bytes("report.html").decode()
    assert "vowels" in page
    assert "share of limit" in page
    for name in ("vowels", "brief"):
        lines = undisturbed.read_bytes(f"values/{name}/i1/metrics.jsonl").decode().splitlines()
        assert sum("loss" in json.loads(line) for line in lines) == 24 * 3
        card = json.loads(undisturbed.read_bytes(f"values/{name}/i1/mavis.json"))
        assert card["parent"] == f"values/{name}/i0"
        assert card["explained_variance"] is not None


def test_a_second_run_skips_everything(
    undisturbed: Store, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(undisturbed)
    out, err = run_here(capsys, config_file)
    assert "hypervolume" in out
    assert err.count("finished before, skipped") == 3 + 4 + 4 + 4 + 1
    assert hashes(undisturbed) == before


def test_another_grid_does_not_sample_the_base_model_again(
    undisturbed: Store, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.root, tmp_path / "undisturbed")
    out, err = run_here(capsys, config_file, f"storage={tmp_path}", "evaluate.grid=4")
    assert "0.67 brief + 0.33 vowels" in out
    assert "evaluate  " in err
    assert "limit  " not in err
    after = hashes(Store(str(tmp_path), "undisturbed"))
    before = hashes(undisturbed)
    assert {path for path in before if after[path] != before[path]} == {"eval/sweep/sweep.json"}


@pytest.mark.usefixtures("ray_address")
def test_objectives_of_one_model_steer_by_their_own_heads(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["value.kind=shared", "iterations=1", "train.epochs=4", "train.learning_rate=0.01", "steer.beta=20"]
    settings += ["train.targets=prefix", f"storage={tmp_path}", "run=shared"]  # heads of prefixes are dropped
    out, _ = run_here(capsys, config_file, *settings)
    assert "hypervolume" in out
    store = Store(str(tmp_path), "shared")
    assert values.published_folders(store) == dict.fromkeys(("brief", "vowels"), "shared/brief-vowels/i0")
    for name in ("brief", "vowels"):
        assert sorted(store.list(f"values/{name}/i0")) == ["_COMPLETE.json", "metrics.jsonl"]
    points = {point["name"]: point for point in store.read_json("eval/sweep/sweep.json")["points"]}
    assert points["vowels"]["divergence"] != points["brief"]["divergence"]

    weights = Path(store.root) / "shared/brief-vowels/i0/model.safetensors"
    trained = weights.read_bytes()
    weights.unlink()
    run_here(capsys, config_file, *settings)
    assert weights.read_bytes() == trained


def test_value_models_of_another_base_are_refused(
    undisturbed: Store, config_file: Path, ray_address: str, tmp_path: Path
) -> None:
    """The base model's folder holds other weights than those that the value models were trained for."""
    settings = yaml.safe_load(config_file.read_text())
    shutil.copytree(Path(undisturbed.root), tmp_path / "undisturbed")
    shutil.copytree(settings["base"]["model"], tmp_path / "base")
    write_base(tmp_path / "other", eos_weight=0.5)
    shutil.copy(tmp_path / "other" / "tiny-llama" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    shutil.rmtree(tmp_path / "undisturbed" / "eval")
    run_file = tmp_path / "undisturbed" / "run.yaml"
    run_file.write_text(run_file.read_text().replace(settings["base"]["model"], str(tmp_path / "base")))
    with pytest.raises(ValueModelError, match="was trained for base model"):
        pipeline.run(load(config_file, [f"storage={tmp_path}", f"base.model={tmp_path / 'base'}"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], ["'seed' is 1", "started with 0", "run=NAME"]),
        (
            ["run=equal", "objectives.same.reward=function", "objectives.same.path=tests.tiny:always_one"],
            ["'same'", "same"],
        ),
        (["run=new", "rollout.cpus_per_actor=1000"], ["rollout.cpus_per_actor=1000", "lower"]),
        (["run=new", "prompts.train=100000"], ["100000"]),
        (["run=new", "base.model=/no/such/model"], ["/no/such/model"]),
        (["run=new", "storage=/proc/nothing"], ["/proc/nothing", "cannot be written"]),
    ],
)
def test_an_impossible_run_ends_with_one_line_and_exit_code_2(
    overrides: list[str],
    words: list[str],
    undisturbed: Store,
    config_file: Path,
    ray_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        arguments.refusing(lambda: pipeline.run(load(config_file, overrides)))
    assert end.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
