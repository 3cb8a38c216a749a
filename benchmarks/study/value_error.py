"""Errors of value models on held-out trees. No Ray.

Shapes: T held-out trees, X targets of all of them side by side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.common.result_cache import EvaluatedModel, result_path
from mavis_dist.config import Config
from mavis_dist.models import value
from mavis_dist.prompts import held_out, load_prompts
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit, data_of, zeta
from mavis_dist.train.fit import predict


@dataclass(frozen=True)
class HeldOut:
    """Errors of one value model, tree by tree."""

    error_T: list[float]  # sum of weight * (V - target)^2 over a tree's targets, sd^2
    weight_T: list[float]  # sum of the weights
    r2: float

    @property
    def error(self) -> float:
        """Weighted mean squared error, sd^2."""
        return sum(self.error_T) / sum(self.weight_T)

    def errors(self, weights_RT: np.ndarray) -> np.ndarray:
        """The same in every resample of the trees, [R]."""
        return (weights_RT @ np.array(self.error_T)) / (weights_RT @ np.array(self.weight_T))


def measure(config: Config, store: Store, model: EvaluatedModel) -> HeldOut | None:
    """The error of a value model on the held-out trees of the policy that it values, with targets at every token.

    Variants learn from copies of the trees in `store`, so all value models of an iteration are measured on the same
    ones. None if no tree is held out.
    """
    if config.prompts.validation == 0:
        return None
    prompts, _ = load_prompts(config.prompts, config.seed)
    ids = frozenset(prompt.id for prompt in held_out(config.prompts, prompts))
    config = config.model_copy(update={"train": config.train.model_copy(update={"targets": "token"})})
    inputs = {
        "value_model": model.fingerprint,
        "prompts": sorted(ids),
        "scale": asdict(model.scale),
        "zeta": zeta(config, model.iteration),
        "depth_balance": config.train.depth_balance,
        "split_backup": config.train.split_backup,
    }
    path = result_path("value_error", model.name, inputs)
    if not store.exists(path):
        store.write_json(path, asdict(_measure(config, store, model, ids)))
    return HeldOut(**store.read_json(path))


def _measure(config: Config, store: Store, model: EvaluatedModel, ids: frozenset[str]) -> HeldOut:
    torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
    # The targets do not depend on the model that the training started from (None).
    _, [trees] = data_of(Fit((model.objective,), model.iteration, None, (model.scale,), ids), config, store)
    value_model, card = value.load(model.folder, device=config.base.device)
    [predictions] = predict(value_model.only(card.objectives.index(model.objective)), [trees], config.base.device)
    ends_T = np.cumsum([len(targets.depth_X) for targets in trees.targets])[:-1]
    error_X = predictions.weight_X * (predictions.pred_X - predictions.target_X) ** 2
    return HeldOut(
        error_T=[float(part.sum()) for part in np.split(error_X, ends_T)],
        weight_T=[float(part.sum()) for part in np.split(predictions.weight_X, ends_T)],
        r2=predictions.r2,
    )
