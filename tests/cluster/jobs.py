"""The pipeline and other jobs as a user runs them, and hashes of its results."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from jobs import pipeline
from mavis_dist.config import load
from mavis_dist.store.files import Store
from tests.root import ROOT
from tests.tiny import write_base

if TYPE_CHECKING:
    import pytest

LIMIT_S = 420


def write_config(folder: Path, model: str | None = None) -> Path:
    """The config of a short run of two iterations; left out, the model is a tiny random one."""
    settings = {
        "run": "undisturbed",
        "storage": str(folder / "runs"),
        "iterations": 2,
        "objectives": {
            "vowels": {"reward": "function", "path": "tests.tiny:count_vowels"},
            "brief": {"reward": "brevity"},
        },
        "base": {"model": model or str(write_base(folder, eos_weight=1.0)), "dtype": "float32"},
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


def start(config_file: Path, address: str, *overrides: str, job: str = "pipeline") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{job}", "--config", str(config_file), *overrides],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What the job printed, on standard output and on standard error."""
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == code, err[-3000:]
    return out, err


def url_of(job: subprocess.Popen[str]) -> str:
    """The URL of the service that a job starts, once it answers."""
    assert job.stdout is not None
    line = job.stdout.readline()
    assert line, job.communicate()[1][-3000:]
    return str(re.findall(r"(http://\S+)/v1", line)[0])


def run_here(capsys: pytest.CaptureFixture[str], config_file: Path, *overrides: str) -> tuple[str, str]:
    """What the pipeline prints, run in this process: it has loaded already what another one would have to."""
    pipeline.run(load(config_file, overrides))
    told = capsys.readouterr()
    return told.out, told.err


def hashes(store: Store) -> dict[str, str]:
    """Content of everything that the run computed: trees, labels, value models, decisions, the limit, the sweep."""
    root = Path(store.root)
    patterns = (
        "rollouts/*/*.parquet",
        "labels/*/*/*.parquet",
        "values/*/i*/model.safetensors",
        "gate/*/*/*.json",
        "eval/limit/**/by_prompt.json",
    )
    files = [*(file for pattern in patterns for file in root.glob(pattern)), root / "eval/sweep/sweep.json"]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
