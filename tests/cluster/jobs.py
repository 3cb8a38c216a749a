"""The pipeline and other jobs as a user runs them, and hashes of its results."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from mavis_dist.store.files import Store
from tests.root import ROOT

LIMIT_S = 420


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
