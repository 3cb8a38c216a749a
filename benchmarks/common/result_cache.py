"""Paths of stored measurements in a run. A path depends on all inputs of its measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mavis_dist.models.directory import fingerprint_model
from mavis_dist.models.value import load_card
from mavis_dist.store import values
from mavis_dist.store.files import Store, digest
from mavis_dist.types import RewardScale


@dataclass(frozen=True)
class EvaluatedModel:
    """A value model that is measured."""

    objective: str
    name: str  # in the guide and in file names
    label: str  # in tables
    iteration: int
    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_model(self.folder)

    @property
    def scale(self) -> RewardScale:
        return load_card(self.folder).only(self.objective).scales[0]


def evaluated_model(store: Store, objective: str, name: str, label: str, iteration: int = 0) -> EvaluatedModel:
    """Raises StoreError if the value model is not finished."""
    return EvaluatedModel(objective, f"{objective}@{name}", label, iteration, values.fetch(store, objective, iteration))


def result_path(kind: str, name: str, inputs: Mapping[str, Any]) -> str:
    """The file of one measurement; different inputs give different files."""
    return f"study/{kind}/{name}-{digest(inputs)}.json"
