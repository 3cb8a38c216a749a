"""The engine of a measurement and the settings that all its requests share. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common.result_cache import EvaluatedModel
from mavis_dist.config import Config
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base


def template(config: Config) -> Request:
    """A request with the run's reference policy and tilt cap, and exact divergences."""
    rollout = config.rollout
    params = SamplingParams(rollout.max_tokens, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)
    return Request("", (), tilt_cap=config.steer.tilt_cap, params=params, scorer=Scorer.FULL)


def load_engine(config: Config, models: Sequence[EvaluatedModel]) -> tuple[BaseModel, Engine]:
    """The base model, and an engine in which every value model is an objective of its own.

    Raises:
        UserError: a model cannot be read, or was trained for another base model.
    """
    torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
    base = load_base(config.base.model, config.base.dtype, config.base.device)
    loaded = {
        folder: value.load(folder, getattr(torch, config.base.dtype), config.base.device, base)
        for folder in dict.fromkeys(model.folder for model in models)
    }
    for _, card in loaded.values():
        card.check(base.fingerprint, base.tokenizer_fingerprint)
    guides = {
        model.name: (loaded[model.folder][0], loaded[model.folder][1].objectives.index(model.objective))
        for model in models
    }
    return base, Engine(base, LocalGuide(guides) if guides else None, config.rollout.rows)
