"""The stored results of a finished run, collected for the report."""

from __future__ import annotations

import json
from typing import Any

from mavis_dist.config import Config
from mavis_dist.evaluate import gate
from mavis_dist.evaluate.metadata import ModelMetadata, StageMetadata
from mavis_dist.evaluate.report import render
from mavis_dist.evaluate.sweep import Sweep
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError


def record_stage(store: Store, name: str, seconds: float, detail: str) -> None:
    """Store how long a stage took; a stage that runs again replaces its entry."""
    stages = [entry for entry in _stages(store) if entry["name"] != name]
    store.write_json(layout.STAGES_FILE, [*stages, {"name": name, "seconds": seconds, "detail": detail}])


def write_report(store: Store, config: Config, settings: dict[str, object], sweep: Sweep) -> str:
    """Write one HTML page about the run; returns its path."""
    models = [
        _model_metadata(store, config, name, iteration)
        for name in config.objectives
        for iteration in range(config.iterations)
    ]
    stages = [StageMetadata(**entry) for entry in _stages(store)]
    page = render(config.run, sweep, models, stages, settings)
    store.write_bytes(layout.REPORT_FILE, page.encode())
    return f"{store.root}/{layout.REPORT_FILE}"


def _model_metadata(store: Store, config: Config, objective: str, iteration: int) -> ModelMetadata:
    metadata = store.metadata(layout.value_folder(objective, iteration)) or {}
    lines = store.read_bytes(f"{layout.value_folder(objective, iteration)}/{layout.METRICS_FILE}").decode().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    reward = config.objectives[objective].reward
    decision = store.metadata(layout.gate_folder(objective, iteration))
    verdict = gate.Decision(**decision).verdict() if decision else ""
    return ModelMetadata(objective, iteration, metadata.get("explained_variance"), losses, reward, verdict)


def _stages(store: Store) -> list[dict[str, Any]]:
    try:
        return store.read_json(layout.STAGES_FILE) if store.exists(layout.STAGES_FILE) else []
    except StoreError:
        return []  # a damaged file: the times are lost
