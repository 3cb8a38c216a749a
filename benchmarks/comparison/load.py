"""The stored policies of a run as models, alone or merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.comparison.merge import add_deltas, read_deltas, weighted_sum
from benchmarks.comparison.policies import FOLDER
from mavis_dist.config import Config
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store, StoreError


def load_merged(config: Config, store: Store, weights: Mapping[str, float], strength: float = 1.0) -> BaseModel:
    """The base model with weighted differences of stored policies: a single policy, or a soup.

    Args:
        weights: of the policies, by name.
        strength: factor of all differences; 0 is the base model.

    Raises:
        StoreError: a policy is not finished, or belongs to another base model.
    """
    base = load_base(config.base.model, config.base.dtype, config.base.device)
    parts = [
        (read_deltas(folder_of(store, name, base.fingerprint)), strength * weight) for name, weight in weights.items()
    ]
    add_deltas(base.model, weighted_sum(part for part in parts if part[1] != 0))
    name = " + ".join(f"{strength * weight:g} {policy}" for policy, weight in weights.items())
    return replace(base, name=f"{base.name} + {name}", fingerprint=f"{base.fingerprint} + {name}")


def folder_of(store: Store, name: str, base_fingerprint: str) -> Path:
    """A local folder with a finished policy; raises StoreError."""
    marker_of(store, name, base_fingerprint)
    return store.download(f"{FOLDER}/{name}")


def marker_of(store: Store, name: str, base_fingerprint: str) -> dict[str, Any]:
    """What is stored about a finished policy (`policies.marker`); raises StoreError."""
    metadata = store.metadata(f"{FOLDER}/{name}")
    if metadata is None:
        raise StoreError(f"there is no finished policy {name!r} in {store.root}: python -m benchmarks.comparison.train")
    if metadata["base"] != base_fingerprint:
        raise StoreError(f"policy {name!r} was trained on another base model: train it again")
    return metadata
