"""One finished run of the pipeline, shared by all tests that compare with it or damage a copy of it.

With a tiny random model, or with the one that MAVIS_FAULTS_MODEL names; the same tests then take minutes each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from mavis_dist.store.files import Store
from tests.cluster.jobs import finish, start
from tests.tiny import write_base


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    base = os.environ.get("MAVIS_FAULTS_MODEL") or write_base(folder, eos_weight=1.0)
    settings = {
        "run": "undisturbed",
        "storage": str(folder / "runs"),
        "iterations": 2,
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
        "evaluate": {"limit_answers": 8},
        "value": {"layers": 1},
        # Long enough to be interrupted.
        "train": {"epochs": 24, "trees_per_step": 2, "learning_rate": 1e-4},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def undisturbed(config_file: Path, ray_address: str) -> Store:
    settings = yaml.safe_load(config_file.read_text())
    out, err = finish(start(config_file, ray_address))
    assert "hypervolume" in out
    stages = ("rollouts i", "labels i", "train i", "gate i")
    for stage in [f"{stage}{iteration}" for stage in stages for iteration in (0, 1)] + ["limit", "evaluate"]:
        assert stage in err, stage
    return Store(settings["storage"], "undisturbed")
