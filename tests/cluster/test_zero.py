"""DeepSpeed's ZeRO stages and adapters train the same kind of model: real DeepSpeed, one worker, no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mavis_dist.core.tree import Shape
from mavis_dist.decode import Engine
from mavis_dist.models.load import load_base
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store.files import Store
from mavis_dist.store.shards import Labels, write_labels, write_trees
from mavis_dist.train.data import label_folder, rollout_folder
from mavis_dist.types import Policy, Prompt
from tests.tiny import write_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled trees of a tiny model, as the stages before training leave them."""
    folder = tmp_path_factory.mktemp("zero")
    base = load_base(str(write_base(folder, eos_weight=1.0)))
    settings = {
        "run": "zero",
        "storage": str(folder / "runs"),
        "objectives": {"vowels": {"reward": "function", "path": "tests.tiny:count_vowels"}},
        "base": {"model": str(folder / "tiny-llama"), "dtype": "float32"},
        "rollout": {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 12},
        "value": {"layers": 1, "lora_rank": 0, "lora_alpha": 8, "lora_dropout": 0.0},
        "train": {"epochs": 2, "trees_per_step": 2, "learning_rate": 1e-2},
    }
    store = Store(settings["storage"], "zero")
    prompts = [Prompt(f"p{i}", "") for i in range(6)]
    grower = TreeGrower(Engine(base), Shape(2, 2, 2, 12), Policy(), Sampling(), 0)
    trees = sorted(grower.grow(prompts, [[5 + i, 6, 7] for i in range(6)]), key=lambda tree: tree.prompt_id)
    write_trees(store, f"{rollout_folder(Policy())}/part-00000.parquet", trees)
    labels = [
        Labels(t.prompt_id, t.leaves(), np.array([float(t.answer(n).sum() % 7) for n in t.leaves()])) for t in trees
    ]
    write_labels(store, f"{label_folder(Policy(), 'vowels')}/part-00000.parquet", labels)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def trained(config_file: Path, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "tests.cluster.zero_worker", str(config_file), str(output), *overrides]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


def test_zero_stages_agree_and_embeddings_stay(config_file: Path, tmp_path: Path) -> None:
    plain = trained(config_file, tmp_path / "0")
    base = load_base(yaml.safe_load(config_file.read_text())["base"]["model"]).model.state_dict()
    assert torch.equal(plain["backbone.embed_tokens.weight"], base["model.embed_tokens.weight"])
    projection = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[f"backbone.{projection}"], base[f"model.{projection}"])
    assert plain["heads.weight"].abs().sum() > 0
    for stage in (1, 2, 3):
        sharded = trained(config_file, tmp_path / str(stage), f"train.zero_stage={stage}")
        assert set(sharded) == set(plain)
        for name, tensor in plain.items():
            assert torch.allclose(sharded[name], tensor, atol=1e-5), (stage, name)


def test_adapters_are_merged_into_a_plain_model(config_file: Path, tmp_path: Path) -> None:
    plain = trained(config_file, tmp_path / "plain", "run=zero")
    adapted = trained(config_file, tmp_path / "lora", "value.lora_rank=4")
    assert set(adapted) == set(plain)
    base = load_base(yaml.safe_load(config_file.read_text())["base"]["model"]).model.state_dict()
    projection = "layers.0.mlp.down_proj.weight"
    change = adapted[f"backbone.{projection}"] - base[f"model.{projection}"]
    assert 0 < torch.linalg.matrix_rank(change, atol=1e-6) <= 4
