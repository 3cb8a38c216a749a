"""Trains one policy of a run and stores it. No Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.comparison.pairs import Pair, pairs_of
from benchmarks.comparison.policies import DPO, TRAINING, PolicySpec, Settings, is_stored, marker
from mavis_dist.config import Config
from mavis_dist.models.hardware import device_name
from mavis_dist.models.load import fetch, fingerprint_model
from mavis_dist.progress import say
from mavis_dist.prompts import held_out, load_prompts
from mavis_dist.rewards import build
from mavis_dist.rollout.labels import reward_scale
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.layout import label_folder
from mavis_dist.store.shards import shard_names
from mavis_dist.train.data import load_trees
from mavis_dist.train.journal import json_lines
from mavis_dist.types import Policy, Prompt, RewardScale, UserError

if TYPE_CHECKING:
    from benchmarks.comparison.usage import Usage

HISTORY_FILE = "metrics.jsonl"  # of a stored policy


def train_policy(spec: PolicySpec, settings: Settings, config: Config, store: Store) -> dict[str, Any]:
    """Train a policy unless it is finished; resumes from the last checkpoint. Returns the marker's content.

    Raises:
        UserError: trl is missing, or the policy was trained with other settings.
        StoreError: the run has no labels of an objective.
    """
    if not is_stored(store, spec, settings):
        if find_spec("trl") is None:
            raise UserError("trl is not installed: pip install 'mavis-dist[comparison]'")
        torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
        with _folder_of(store, spec) as folder:
            _train(spec, settings, config, store, folder)
        store.delete(f"{TRAINING}/{spec.name}")
    metadata = store.metadata(spec.folder)
    assert metadata is not None
    say(f"train {spec.name}", f"finished: {metadata['seconds']:.0f} s, {metadata['tokens']} tokens sampled")
    return metadata


def _train(spec: PolicySpec, settings: Settings, config: Config, store: Store, folder: Path) -> None:
    from benchmarks.comparison.usage import last_checkpoint

    checkpoint, usage = last_checkpoint(folder, settings)
    trainer = _trainer(spec, settings, config, store, folder, usage)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    with tempfile.TemporaryDirectory() as work:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(work)
        (Path(work) / HISTORY_FILE).write_text(json_lines(usage.history))
        fingerprint = fingerprint_model(fetch(config.base.model))
        machine = device_name(config.base.device)
        store.upload(Path(work), spec.folder, marker(spec, settings, fingerprint, machine, usage.costs))


def _trainer(spec: PolicySpec, settings: Settings, config: Config, store: Store, folder: Path, usage: Usage) -> Any:
    from benchmarks.comparison import trainers

    if spec.kind == DPO:
        pairs = preference_pairs(spec, settings, config, store)
        usage.answers = 2 * len(pairs)
        return trainers.dpo_trainer(spec, settings, config, pairs, folder, usage)
    rewards = {name: (build(config.objectives[name]), scale_of(config, store, name)) for name in spec.weights}
    questions = [prompt.text for prompt in training_prompts(config)]
    return trainers.rl_trainer(spec, settings, config, questions, rewards, folder, usage)


def preference_pairs(spec: PolicySpec, settings: Settings, config: Config, store: Store) -> list[Pair]:
    """Pairs from the base model's trees, by the reward of the policy's objective."""
    [objective] = spec.weights
    scale_of(config, store, objective)  # refuses a run without labels
    train, _ = load_prompts(config.prompts, config.seed)
    excluded = {prompt.id for prompt in held_out(config.prompts, train)}
    return pairs_of(load_trees(store, Policy(), objective), excluded, settings.pairs_per_prompt)


def training_prompts(config: Config) -> list[Prompt]:
    """Those that value models are trained on."""
    train, _ = load_prompts(config.prompts, config.seed)
    return train[: len(train) - config.prompts.validation]


def scale_of(config: Config, store: Store, objective: str) -> RewardScale:
    """The unit of an objective in the run; raises StoreError if the run has no labels of it."""
    folder = label_folder(Policy(), objective)
    if store.metadata(folder) is None:
        raise StoreError(f"{store.root}/{folder} is not finished: run jobs.pipeline with this config first")
    paths = [f"{folder}/{name}" for name in shard_names(store, folder)]
    return reward_scale(store, objective, paths, {prompt.id for prompt in training_prompts(config)})


@contextmanager
def _folder_of(store: Store, spec: PolicySpec) -> Iterator[Path]:
    """The local folder of a policy's checkpoints; with remote storage a temporary one, which no other attempt finds."""
    if "://" in store.storage:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield Path(store.uri(f"{TRAINING}/{spec.name}"))
