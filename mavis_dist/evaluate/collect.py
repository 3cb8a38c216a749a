"""What a finished run left in its store, for the report."""

from __future__ import annotations

import json
from typing import Any

from mavis_dist.config import Config
from mavis_dist.evaluate import gate
from mavis_dist.evaluate.facts import ModelFacts, StageFacts
from mavis_dist.evaluate.report import render
from mavis_dist.evaluate.sweep import Sweep
from mavis_dist.store import values
from mavis_dist.store.files import Store, StoreError

STAGES_FILE = "stages.json"
REPORT_FILE = "report.html"


def record_stage(store: Store, name: str, seconds: float, detail: str) -> None:
    """Remember how long a stage took; a stage that is done again replaces its entry."""
    stages = [entry for entry in _stages(store) if entry["name"] != name]
    store.write_json(STAGES_FILE, [*stages, {"name": name, "seconds": seconds, "detail": detail}])


def write_report(store: Store, config: Config, settings: dict[str, object], sweep: Sweep) -> str:
    """One HTML page about the run; returns where it is."""
    models = [
        _model_facts(store, config, name, iteration)
        for name in config.objectives
        for iteration in range(config.iterations)
    ]
    stages = [StageFacts(**entry) for entry in _stages(store)]
    page = render(config.run, sweep, models, stages, settings)
    store.write_bytes(REPORT_FILE, page.encode())
    return f"{store.root}/{REPORT_FILE}"


def _model_facts(store: Store, config: Config, objective: str, iteration: int) -> ModelFacts:
    facts = store.facts(values.folder(objective, iteration)) or {}
    lines = store.read_bytes(f"{values.folder(objective, iteration)}/{values.METRICS_FILE}").decode().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    reward = config.objectives[objective].reward
    decision = store.facts(gate.folder(objective, iteration))
    verdict = gate.Decision(**decision).verdict() if decision else ""
    return ModelFacts(objective, iteration, facts.get("explained_variance"), losses, reward, verdict)


def _stages(store: Store) -> list[dict[str, Any]]:
    try:
        return store.read_json(STAGES_FILE) if store.exists(STAGES_FILE) else []
    except StoreError:
        return []  # times of stages that nobody can tell any more
