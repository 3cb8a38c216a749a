"""Times stages of the pipeline on a real Ray cluster, in temporary storage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.common.interleave import Rates, take_turns
from mavis_dist import cluster, pipeline
from mavis_dist.config import Config
from mavis_dist.run_state import RunState
from mavis_dist.store.files import Store
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.store.shards import read_trees, shard_names
from mavis_dist.types import Policy, UserError

NUM_SHARDS = 4  # of grown trees; divides evenly between two actors


@contextmanager
def temporary_run(config: Config) -> Iterator[RunState]:
    """An open run with empty storage."""
    cluster.connect()
    with tempfile.TemporaryDirectory(prefix="mavis-benchmark-") as storage:
        yield pipeline.open_run(config.model_copy(update={"storage": storage}))


def section(config: Config, name: str, **settings: Any) -> Config:
    """The config with some settings of one section replaced."""
    return config.model_copy(update={name: getattr(config, name).model_copy(update=settings)})


def copy_base_trees(source: Store, target: Store, config: Config, num_shards: int) -> None:
    """Copy the first shards of the base model's trees with all their labels."""
    folders = [rollout_folder(Policy()), *(label_folder(Policy(), name) for name in config.objectives)]
    for folder in folders:
        for name in shard_names(source, folder)[:num_shards]:
            target.write_bytes(f"{folder}/{name}", source.read_bytes(f"{folder}/{name}"))
        target.finish(folder, source.metadata(folder) or {})


def fit_seconds(config: Config, source: Store, num_shards: int, epochs: int, repetitions: int) -> Rates:
    """Seconds of the training stage of iteration 0, with as many objectives at once as fit, and one after the other.

    Every variant starts its own workers. One after the other is measured with the configured cores per worker and with
    all cores of the machine.
    """
    with temporary_run(section(config, "train", epochs=epochs)) as state:
        copy_base_trees(source, state.store, config, num_shards)
        _require(state.plan.fits_at_once, 2, "trainings")
        all_cores = section(state.config, "train", cpus_per_worker=max(node.cpus for node in cluster.nodes()))
        variants = {
            "in_turn": _with_fits_at_once(state, 1),
            "at_once": state,
            "in_turn_all_cores": _with_fits_at_once(replace(state, config=all_cores), 1),
        }
        _fit(variants["at_once"])  # warms up the disk cache
        stages = take_turns({name: partial(_fit, variant) for name, variant in variants.items()}, repetitions)
    return {name: [1 / rate for rate in rates] for name, rates in stages.per_s.items()}


def _with_fits_at_once(state: RunState, count: int) -> RunState:
    return replace(state, plan=replace(state.plan, fits_at_once=count))


def _fit(state: RunState, repetition: int = 0) -> int:
    for folder in ("values", "train"):
        state.store.delete(folder)
    pipeline.fit(state, 0)
    return 1


def growth_rates(config: Config, num_prompts: int, repetitions: int) -> Rates:
    """Answer tokens/s of the rollout stage of iteration 0 with one actor and with two, one core each, models loaded."""
    config = section(config, "prompts", train=num_prompts, validation=0)
    rates: Rates = {"1 actor": [], "2 actors": []}
    for repetition in range(repetitions):
        for count in (1, 2) if repetition % 2 == 0 else (2, 1):
            settings = {"actors": count, "cpus_per_actor": 1, "prompts_per_shard": max(1, num_prompts // NUM_SHARDS)}
            with temporary_run(section(config, "rollout", **settings)) as state:
                _require(int(sum(node.cpus for node in cluster.nodes())), count, "rollout actors")
                rates[["1 actor", "2 actors"][count - 1]].append(_growth_rate(state))
    return rates


def _growth_rate(state: RunState) -> float:
    try:
        state.worker_pool().wait_until_loaded()
        started = time.perf_counter()
        pipeline.grow(state, 0, [Policy()])
        seconds = time.perf_counter() - started
    finally:
        state.release_workers()
    folder = rollout_folder(Policy())
    trees = [tree for name in shard_names(state.store, folder) for tree in read_trees(state.store, f"{folder}/{name}")]
    return sum(len(tree.tokens) for tree in trees) / seconds


def _require(fit: int, needed: int, what: str) -> None:
    """Raises UserError if fewer than `needed` fit on the cluster."""
    if fit < needed:
        raise UserError(f"{needed} {what} at once need one core each; {fit} fit on this cluster: use a larger machine")
