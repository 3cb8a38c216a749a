"""One training under ZeRO stages, workers, passes and interruptions, on real DeepSpeed without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.common.service import free_port
from mavis_dist.models.load import load_base
from mavis_dist.store.files import Store
from mavis_dist.store.layout import label_folder
from mavis_dist.store.shards import Labels, write_labels
from mavis_dist.types import Policy
from tests.root import ROOT
from tests.tiny import write_base
from tests.training.stored import store_trees


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled trees of a tiny model, as the stages before training store them."""
    folder = tmp_path_factory.mktemp("zero")
    base = load_base(str(write_base(folder, eos_weight=1.0)))
    settings = {
        "run": "trees",
        "storage": str(folder / "runs"),
        "objectives": {"vowels": {"reward": "function", "path": "tests.tiny:count_vowels"}},
        "base": {"model": str(folder / "tiny-llama"), "dtype": "float32"},
        "rollout": {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 12},
        "value": {"layers": 1, "lora_rank": 0, "lora_alpha": 8, "lora_dropout": 0.0},
        "train": {"epochs": 2, "trees_per_step": 4, "learning_rate": 1e-2},
    }
    store = Store(settings["storage"], "trees")
    trees = store_trees(store, base, 8)
    labels = [
        Labels(t.prompt_id, t.leaves(), np.array([float(t.answer(n).sum() % 7) for n in t.leaves()])) for t in trees
    ]
    write_labels(store, f"{label_folder(Policy(), 'vowels')}/part-00000.parquet", labels)
    store.finish(label_folder(Policy(), "vowels"), {})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


ALONE = {
    "plain": [],
    "passes": ["train.accumulation=2"],
    "stage-1": ["train.zero_stage=1"],
    "stage-2": ["train.zero_stage=2"],
    "stage-3": ["train.zero_stage=3"],
    "offloaded": ["train.zero_stage=2", "train.offload=true"],
    "lora": ["value.lora_rank=4"],
    "stopped": ["stop=1", "stop=2"],
    "stopped-stage-2": ["train.zero_stage=2", "stop=3"],
    "stopped-stage-3": ["train.zero_stage=3", "stop=3"],
    "stopped-lora": ["value.lora_rank=4", "value.lora_dropout=0.2", "stop=2"],
    "lora-dropout": ["value.lora_rank=4", "value.lora_dropout=0.2"],
}
TOGETHER = {"two": [], "two-stage-2": ["train.zero_stage=2"], "two-stopped-stage-2": ["train.zero_stage=2", "stop=3"]}


@pytest.fixture(scope="module")
def runs(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run for every variant."""
    output = tmp_path_factory.mktemp("runs")
    groups = []
    for variants, size in ((ALONE, 1), (TOGETHER, 2)):
        port = free_port()
        for rank in range(size):
            arguments = [str(config_file), str(output), str(rank), str(size), str(port)]
            log = (output / f"{size}-{rank}.log").open("w+")
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.training.zero_worker", *arguments],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
            )  # fmt: skip
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(variants))
            worker.stdin.close()
            groups.append((worker, log))
    for worker, log in groups:
        code = worker.wait(timeout=300)
        log.seek(0)
        assert code == 0, log.read()[-3000:]
    return output


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "values/vowels/i0/model.safetensors")


def losses(runs: Path, name: str) -> list[float]:
    lines = (runs / name / "values/vowels/i0/metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_training_changes_all_but_the_embeddings(runs: Path, config_file: Path) -> None:
    plain = weights(runs, "plain")
    base = load_base(yaml.safe_load(config_file.read_text())["base"]["model"]).model.state_dict()
    assert torch.equal(plain["backbone.embed_tokens.weight"], base["model.embed_tokens.weight"])
    projection = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[f"backbone.{projection}"], base[f"model.{projection}"])
    assert plain["heads.weight"].abs().sum() > 0
    assert len(losses(runs, "plain")) == 4


@pytest.mark.parametrize("name", ["passes", "stage-1", "stage-2", "stage-3", "offloaded", "two", "two-stage-2"])
def test_loss_and_model_do_not_depend_on_how_the_work_is_split(runs: Path, name: str) -> None:
    np.testing.assert_allclose(losses(runs, name), losses(runs, "plain"), rtol=1e-5)
    plain, other = weights(runs, "plain"), weights(runs, name)
    assert set(other) == set(plain)
    for key, tensor in plain.items():
        assert torch.allclose(other[key], tensor, atol=1e-5), key


@pytest.mark.parametrize(
    ("stopped", "undisturbed"),
    [
        ("stopped", "plain"),
        ("stopped-stage-2", "stage-2"),
        ("stopped-stage-3", "stage-3"),
        ("stopped-lora", "lora-dropout"),
        ("two-stopped-stage-2", "two-stage-2"),
    ],
)
def test_interrupted_training_ends_with_the_same_bits(runs: Path, stopped: str, undisturbed: str) -> None:
    assert losses(runs, stopped) == losses(runs, undisturbed)
    one, other = weights(runs, stopped), weights(runs, undisturbed)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_adapters_are_merged_into_a_plain_model(runs: Path, config_file: Path) -> None:
    plain, adapted = weights(runs, "plain"), weights(runs, "lora")
    assert set(adapted) == set(plain)
    base = load_base(yaml.safe_load(config_file.read_text())["base"]["model"]).model.state_dict()
    projection = "layers.0.mlp.down_proj.weight"
    change = adapted[f"backbone.{projection}"] - base[f"model.{projection}"]
    assert 0 < torch.linalg.matrix_rank(change, atol=1e-6) <= 4


def test_nothing_is_left_behind(runs: Path) -> None:
    """Neither checkpoints of finished training, nor DeepSpeed's buffers in shared memory."""
    assert not list(runs.glob("*/train/**/step-*"))
    owners = {path.name.split("_127.0.0.1_")[-1] for path in Path("/dev/shm").glob("deepspeed_*_127.0.0.1_*")}
    assert not owners
    events = list((runs / "stopped").glob("train/vowels/i0/tensorboard/events*"))
    assert len(events) == 3  # one file of every attempt
