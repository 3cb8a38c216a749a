"""The whole pipeline on real Ray, Ray Train and DeepSpeed, with a tiny model: finished, resumed, killed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs import arguments
from mavis_dist import pipeline
from mavis_dist.config import load
from mavis_dist.store import values
from mavis_dist.store.files import MARKER, Store
from tests.tiny import write_base

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    base = write_base(folder, eos_weight=1.0)
    settings = {
        "run": "undisturbed",
        "storage": str(folder / "runs"),
        "objectives": {
            "vowels": {"reward": "function", "path": "tests.tiny:count_vowels"},
            "brief": {"reward": "brevity"},
        },
        "base": {"model": str(base), "dtype": "float32"},
        "prompts": {"train": 8, "validation": 2, "evaluation": 4},
        "rollout": {
            "first": {"root": 2, "children": 2, "layers": 2},
            "later": {"root": 2, "children": 2, "layers": 2},
            "max_tokens": 12,
            "cpus_per_actor": 1,
            "prompts_per_shard": 4,
        },
        "steer": {"beta": 2},
        "value": {"layers": 1},
        "train": {"epochs": 2, "trees_per_step": 2, "learning_rate": 1e-3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(config_file: Path, address: str, *overrides: str) -> subprocess.Popen[str]:
    """The job as a user would run it, in the cluster of the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.pipeline", "--config", str(config_file), *overrides],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, err[-3000:]
    return out, err


def hashes(store: Store) -> dict[str, str]:
    """Content of everything that the run computed: trees, labels, value models, the sweep."""
    root = Path(store.root)
    files = [*root.glob("rollouts/*/*.parquet"), *root.glob("labels/*/*/*.parquet"), root / "eval/sweep/sweep.json"]
    files += root.glob("values/*/i*/model.safetensors")
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, ray_address: str) -> Store:
    settings = yaml.safe_load(config_file.read_text())
    out, err = finish(start(config_file, ray_address))
    assert "hypervolume" in out
    for stage in ("rollouts i0", "labels i0", "train i0", "rollouts i1", "labels i1", "train i1", "evaluate"):
        assert stage in err, stage
    return Store(settings["storage"], "undisturbed")


def test_everything_is_there_and_published(undisturbed: Store) -> None:
    assert values.published(undisturbed) == {"brief": 1, "vowels": 1}
    assert len(hashes(undisturbed)) == 3 * 2 + 4 * 2 + 1 + 4
    page = undisturbed.read_bytes("report.html").decode()
    assert "vowels" in page
    for name in ("vowels", "brief"):
        lines = undisturbed.read_bytes(f"train/{name}/i1/metrics.jsonl").decode().splitlines()
        assert sum("loss" in json.loads(line) for line in lines) == 2 * 3
        card = json.loads(undisturbed.read_bytes(f"values/{name}/i1/mavis.json"))
        assert card["parent"] == f"values/{name}/i0"
        assert card["explained_variance"] is not None


def test_a_second_run_skips_everything(undisturbed: Store, config_file: Path, ray_address: str) -> None:
    before = hashes(undisturbed)
    out, err = finish(start(config_file, ray_address))
    assert "hypervolume" in out
    assert err.count("finished before, skipped") == 3 + 4 + 4 + 1
    assert hashes(undisturbed) == before


def test_a_driver_killed_at_any_stage_is_resumed_to_the_same_bytes(
    undisturbed: Store, config_file: Path, ray_address: str
) -> None:
    store = Store(undisturbed.storage, "killed")
    landmarks = [
        "rollouts/base/part-00000.parquet",
        f"labels/base/brief/{MARKER}",
        f"labels/brief-i1/brief/{MARKER}",
    ]
    for landmark in landmarks:
        job = start(config_file, ray_address, "run=killed")
        deadline = time.monotonic() + LIMIT_S
        while not store.exists(landmark):
            assert job.poll() is None, job.communicate()[1][-3000:]
            assert time.monotonic() < deadline, f"{landmark} did not appear"
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.communicate()
    finish(start(config_file, ray_address, "run=killed"))
    assert hashes(store) == hashes(undisturbed)


def test_a_new_objective_leaves_trees_and_models_alone(
    undisturbed: Store, config_file: Path, ray_address: str, tmp_path: Path
) -> None:
    shutil.copytree(Path(undisturbed.root), tmp_path / "undisturbed")
    more = ["objectives.again.reward=function", "objectives.again.path=tests.tiny:count_vowels"]
    finish(start(config_file, ray_address, f"storage={tmp_path}", "iterations=1", *more))
    before, after = hashes(undisturbed), hashes(Store(str(tmp_path), "undisturbed"))
    assert "values/again/i0/model.safetensors" in after
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {"eval/sweep/sweep.json"}


def test_value_models_of_another_base_are_refused(
    undisturbed: Store, config_file: Path, ray_address: str, tmp_path: Path
) -> None:
    """The base model's folder now holds other weights than those that the value models were trained for."""
    settings = yaml.safe_load(config_file.read_text())
    shutil.copytree(Path(undisturbed.root), tmp_path / "undisturbed")
    shutil.copytree(settings["base"]["model"], tmp_path / "base")
    write_base(tmp_path / "other", eos_weight=0.5)
    shutil.copy(tmp_path / "other" / "tiny-llama" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    shutil.rmtree(tmp_path / "undisturbed" / "eval")
    run_file = tmp_path / "undisturbed" / "run.yaml"
    run_file.write_text(run_file.read_text().replace(settings["base"]["model"], str(tmp_path / "base")))
    job = start(config_file, ray_address, f"storage={tmp_path}", f"base.model={tmp_path / 'base'}")
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 2, err[-3000:]
    assert "was trained for base model" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], ["'seed' is 1", "started with 0", "run=NAME"]),
        (
            ["run=new", "objectives.same.reward=function", "objectives.same.path=tests.tiny:always_one"],
            ["'same'", "same"],
        ),
        (["run=new", "rollout.cpus_per_actor=1000"], ["rollout.cpus_per_actor=1000", "lower"]),
        (["run=new", "prompts.train=100000"], ["100000"]),
        (["run=new", "base.model=/no/such/model"], ["/no/such/model"]),
        (["run=new", "storage=/proc/nothing"], ["/proc/nothing", "cannot be written"]),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
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
