"""The stored results of a finished run, collected for the report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def timed(store: Store, stage: str, detail: str, is_needed: bool = True) -> Iterator[None]:
    """Record how long the work of a stage takes, also of one that fails or is stopped. A kill -9 loses the time."""
    started = time.monotonic()
    try:
        yield
    finally:
        if is_needed:
            record_stage(store, stage, time.monotonic() - started, detail)


def record_stage(store: Store, name: str, seconds: float, detail: str) -> None:
    """Add to how long a stage has taken in all its parts and attempts; the detail is that of the last one."""
    stages = {entry["name"]: entry for entry in _stages(store)}
    before = stages.pop(name, {}).get("seconds") or 0.0
    entry = {"name": name, "seconds": before + seconds, "detail": detail}
    store.write_json(layout.STAGES_FILE, [*stages.values(), entry])


def stages_of(store: Store) -> list[StageMetadata]:
    """The stages of a run with their times, in the order in which they ran."""
    return [StageMetadata(**entry) for entry in _stages(store)]


def stage_seconds(store: Store, names: tuple[str, ...] = ("",)) -> dict[str, float]:
    """How long the stages of a run took whose names begin in one of these ways."""
    return {stage.name: stage.seconds or 0.0 for stage in stages_of(store) if stage.name.startswith(names)}


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
