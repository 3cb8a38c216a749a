"""Configs of models and of runs, as small files and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mavis_dist.config import Config, parse
from mavis_dist.sizing.memory import Models
from mavis_dist.sizing.sizes import SHAPES, Size

# Llama 2 with 7 billion parameters, counted by hand: 4 matrices of attention and 3 of the feed-forward part per layer.
LAYER_7B = 4 * 4096 * 4096 + 3 * 4096 * 11008
SIZE_7B = Size(
    layers=32,
    hidden=4096,
    inner=11008,
    vocabulary=32000,
    embedding=32000 * 4096,
    head=32000 * 4096,
    matrices=LAYER_7B,
    rest=65 * 4096,
    key_heads=32,
    channels=4096,
    inputs_outputs=4 * 2 * 4096 + 3 * (4096 + 11008),
)
MODELS_7B = Models(SIZE_7B, SIZE_7B.backbone(8))


def write_config(folder: Path, name: str) -> Path:
    """A model directory of one of SHAPES that has nothing but a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPES[name]}))
    return folder


def run_config(objectives: int = 1, **sections: Any) -> Config:
    names = {f"o{number}": {"reward": "sentiment"} for number in range(objectives)}
    return parse({"run": "r", "objectives": names, **sections})
