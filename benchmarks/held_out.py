"""How well value models predict the trees that they did not train on. No Ray.

Shapes: T held-out trees.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.cells import Subject, cell_path
from mavis_dist.config import Config
from mavis_dist.models import value
from mavis_dist.prompts import load_prompts
from mavis_dist.store.files import Store
from mavis_dist.train import fit as fitting


@dataclass(frozen=True)
class HeldOut:
    """Errors of one value model, tree by tree."""

    error_T: list[float]  # sum of weight * (V - target)^2 over a tree's targets, sd^2
    weight_T: list[float]  # sum of the weights
    explained_variance: float

    @property
    def error(self) -> float:
        """Weighted mean squared error, sd^2."""
        return sum(self.error_T) / sum(self.weight_T)

    def errors(self, weights_RT: np.ndarray) -> np.ndarray:
        """The same in every resample of the trees, [R]."""
        return (weights_RT @ np.array(self.error_T)) / (weights_RT @ np.array(self.weight_T))


def measure(config: Config, store: Store, subject: Subject) -> HeldOut | None:
    """The error of a value model on the held-out trees of the policy that it values, with targets at every token.

    A variant learns from copies of the trees in `store`, so all value models of an iteration meet the same ones. None
    if no tree is held out.
    """
    if config.prompts.validation == 0:
        return None
    prompts, _ = load_prompts(config.prompts, config.seed)
    ids = frozenset(prompt.id for prompt in prompts[-config.prompts.validation :])
    config = config.model_copy(update={"train": config.train.model_copy(update={"targets": "token"})})
    inputs = {
        "value_model": subject.fingerprint,
        "prompts": sorted(ids),
        "scale": asdict(subject.scale),
        "zeta": fitting.zeta(config, subject.iteration),
        "depth_balance": config.train.depth_balance,
    }
    path = cell_path("held_out", subject.name, inputs)
    if not store.exists(path):
        fit = fitting.Fit(subject.objective, subject.iteration, subject.scale, ids)
        store.write_json(path, asdict(_measure(config, store, subject, fit)))
    return HeldOut(**store.read_json(path))


@torch.no_grad()
def _measure(config: Config, store: Store, subject: Subject, fit: fitting.Fit) -> HeldOut:
    torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
    _, trees = fitting.data_of(fit, config, store)
    model, _ = value.load(subject.folder, device=config.base.device)
    explained = fitting.explained_variance(model, trees, config.base.device)
    assert explained is not None
    return HeldOut(
        error_T=[float(fitting.squared_error(model, trees, [t], config.base.device)) for t in range(len(trees))],
        weight_T=[trees.total_weight([t]) for t in range(len(trees))],
        explained_variance=explained,
    )
