"""The stored results of a finished run, collected for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mavis_dist.config import Config
from mavis_dist.core import siblings
from mavis_dist.evaluate import gate
from mavis_dist.evaluate.metadata import ModelMetadata, StageMetadata
from mavis_dist.evaluate.report import render
from mavis_dist.evaluate.sweep import Estimate, Sweep
from mavis_dist.store import layout
from mavis_dist.store.files import DamagedFile, Store
from mavis_dist.types import R2_KEY

SHOWN_TOKENS = (1, 4)  # of the sibling test


def record_stage(store: Store, name: str, seconds: float, detail: str) -> None:
    """Store how long a stage took; a stage that runs again replaces its entry."""
    stages = [entry for entry in _stages(store) if entry["name"] != name]
    store.write_json(layout.STAGES_FILE, [*stages, {"name": name, "seconds": seconds, "detail": detail}])


def stages_of(store: Store) -> list[StageMetadata]:
    """The stages of a run with their times, in the order in which they ran."""
    return [StageMetadata(**entry) for entry in _stages(store)]


def write_report(store: Store, config: Config, settings: dict[str, object], sweep: Sweep) -> str:
    """Write one HTML page about the run; returns its path."""
    models = [
        model_metadata(store, config, name, iteration)
        for name in config.objectives
        for iteration in range(config.iterations)
    ]
    page = render(config.run, sweep, models, stages_of(store), settings)
    store.write_bytes(layout.REPORT_FILE, page.encode())
    return f"{store.root}/{layout.REPORT_FILE}"


def model_metadata(store: Store, config: Config, objective: str, iteration: int) -> ModelMetadata:
    """What is stored about one value model."""
    metadata = store.metadata(layout.value_folder(objective, iteration)) or {}
    lines = store.read_bytes(f"{layout.value_folder(objective, iteration)}/{layout.METRICS_FILE}").decode().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    reward = config.objectives[objective].reward
    decision = store.metadata(layout.gate_folder(objective, iteration))
    verdict = gate.Decision(**decision).verdict() if decision else ""
    return ModelMetadata(
        objective,
        iteration,
        metadata.get(R2_KEY),
        losses,
        reward,
        verdict,
        metadata.get(siblings.CEILING_KEY),
        slopes=_sibling_figures(metadata, siblings.SLOPE_KEY),
        correlations=_sibling_figures(metadata, siblings.CORRELATION_KEY),
    )


def _sibling_figures(metadata: Mapping[str, Any], name: str) -> dict[int, Estimate]:
    """One figure of the sibling test by number of tokens; without those that were not measured."""
    keys = {num_tokens: siblings.interval_keys(name, num_tokens) for num_tokens in SHOWN_TOKENS}
    return {n: Estimate(*(metadata[key] for key in triple)) for n, triple in keys.items() if triple[0] in metadata}


def _stages(store: Store) -> list[dict[str, Any]]:
    try:
        return store.read_json(layout.STAGES_FILE) if store.exists(layout.STAGES_FILE) else []
    except DamagedFile:
        return []  # a damaged file: the times are lost
