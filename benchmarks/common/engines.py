"""Engines of a run's models, and what all measured requests have in common. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common.result_cache import Subject
from mavis_dist.config import Config
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base


def template(config: Config) -> Request:
    """What all requests have in common: exact divergences, and the reference policy and cap of the run."""
    rollout = config.rollout
    params = SamplingParams(rollout.max_tokens, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)
    return Request("", (), tilt_cap=config.steer.tilt_cap, params=params, scorer=Scorer.FULL)


def load_engine(config: Config, subjects: Sequence[Subject]) -> tuple[BaseModel, Engine]:
    """The base model, and the engine in which every value model is an objective of its own.

    Raises:
        UserError: a model cannot be read, or was trained for another base model.
    """
    torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
    base = load_base(config.base.model, config.base.dtype, config.base.device)
    models = {}
    for subject in subjects:
        model, card = value.load(subject.folder, getattr(torch, config.base.dtype), config.base.device)
        card.check(base.fingerprint, base.tokenizer_fingerprint)
        models[subject.name] = model
    return base, Engine(base, LocalGuide(models) if models else None, config.rollout.rows)
