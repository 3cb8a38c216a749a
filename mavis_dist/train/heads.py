"""Fits a value model of kind `states`: linear heads on the base model's hidden states, in closed form.

The loss is that of other value models (`mavis_dist.train.fit`). It is quadratic in a linear head, so one pass over the
trees gathers all that it depends on, for all objectives, and its minimum is the solution of linear equations: there are
no steps and no learning rate. A head on many channels overfits few prompts, so its distance to where the training
starts is penalised (ridge regression), as strongly as serves held-out trees best (cross-validation over the training
trees), for each objective on its own.

Shapes: X targets, Y of them that are compared with siblings, M objectives, H hidden size, J = H + 1: a state with a 1
appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
import torch.nn.functional as F

from mavis_dist.config import Config
from mavis_dist.models.load import load_base
from mavis_dist.models.masks import tree_inputs
from mavis_dist.models.states import first_layers, state_layer
from mavis_dist.models.value import ValueModel, load_objective
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit, TreeSet, data_of
from mavis_dist.train.fit import at_targets, centred, mean_r2, validate
from mavis_dist.train.journal import FIGURES, Journal, Metrics
from mavis_dist.train.model import make_card, store_model
from mavis_dist.train.worker_group import WorkerGroup

FOLDS = 8  # of the training trees
RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(4, -9, -1))  # per variance of a channel; strongest first
TREES_PER_PASS = 4


@dataclass(frozen=True)
class Squares:
    """The sum of weighted squared errors of some targets as a function of an objective's head w: w'Gw - 2w'm + c.

    States and weights are the same for all objectives, and so is G.
    """

    gram_JJ: torch.Tensor
    moment_JM: torch.Tensor
    constant_M: torch.Tensor
    weight: torch.Tensor  # sum of the weights

    @classmethod
    def of(cls, state_XJ: torch.Tensor, value_XM: torch.Tensor, weight_X: torch.Tensor) -> Squares:
        weighted_JX = (state_XJ * weight_X[:, None]).T
        return cls(weighted_JX @ state_XJ, weighted_JX @ value_XM, weight_X @ value_XM**2, weight_X.sum())

    def __add__(self, other: Squares) -> Squares:
        return Squares(*(mine + theirs for mine, theirs in zip(self._parts, other._parts, strict=True)))

    def scaled(self, factor: float | torch.Tensor) -> Squares:
        return Squares(*(part * factor for part in self._parts))

    def mean(self) -> Squares:
        """Per unit of weight; 0 without any."""
        return self.scaled(1.0 / self.weight.clamp_min(1e-12))

    def cpu(self) -> Squares:
        return Squares(*(part.cpu() for part in self._parts))

    def at(self, head_JM: torch.Tensor) -> torch.Tensor:
        """The errors of every objective's head, [M]."""
        return (head_JM * (self.gram_JJ @ head_JM - 2 * self.moment_JM)).sum(0) + self.constant_M

    @property
    def _parts(self) -> tuple[torch.Tensor, ...]:
        return self.gram_JJ, self.moment_JM, self.constant_M, self.weight


@dataclass(frozen=True)
class Errors:
    """What the loss consists of, in double precision."""

    plain: Squares
    sibling: Squares  # of differences to the mean of siblings

    @classmethod
    def of(
        cls, state_XH: torch.Tensor, value_XM: torch.Tensor, weight_X: torch.Tensor, siblings_X: torch.Tensor
    ) -> Errors:
        state_XJ, value_XM, weight_X = F.pad(state_XH.double(), (0, 1), value=1.0), value_XM.double(), weight_X.double()
        is_compared_X, parts = siblings_X >= 0, (state_XJ.shape[1], value_XM.shape[1])
        both_YK = centred(torch.cat([state_XJ, value_XM], -1)[is_compared_X], siblings_X[is_compared_X])
        (difference_YJ, difference_YM), equal_Y = both_YK.split(parts, -1), both_YK.new_ones(len(both_YK))
        plain = Squares.of(state_XJ, value_XM, weight_X)
        return cls(plain, Squares.of(difference_YJ, difference_YM, equal_Y))

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.plain + other.plain, self.sibling + other.sibling)

    def cpu(self) -> Errors:
        return Errors(self.plain.cpu(), self.sibling.cpu())

    def loss(self, sibling_weight: float) -> Squares:
        return self.plain.mean() + self.sibling.mean().scaled(sibling_weight)


def train(fit: Fit, config: Config, store: Store, group: WorkerGroup) -> None:
    """Fit and store the heads, with the figures of the validation trees. Call it on all workers of a process group.

    It cannot resume: it takes as long as one epoch's forward passes. Raises Stopped if asked to stop.
    """
    training, _, validation = data_of(fit, config, store)
    model, layer = initial_model(fit, config, store)
    folds = fold_errors(model, training, group, fit.name)
    if group.rank == 0:
        head_JM, metrics = best_heads(folds, heads_of(model), config.train.sibling_weight, fit.objectives)
        set_heads(model, head_JM)
        figures = dict(zip(fit.objectives, validate(model, validation), strict=True))
        r2 = mean_r2(figures)
        if r2 is not None:
            metrics.append({"step": len(metrics), "epoch": 0, FIGURES: figures})
        journal = Journal(store.uri(layout.tensorboard_folder(fit.name, fit.iteration)), 0)
        for entry in metrics:
            journal.write(entry)
        about = {"steps": len(RIDGES), "epoch": 0}
        store_model(fit, store, model, make_card(fit, config, r2, layer), metrics, figures, about)
    num_passes = len(passes_over(len(training[0])))
    group.progress(fit.name, num_passes, num_passes, "done")
    group.barrier()


def initial_model(fit: Fit, config: Config, store: Store) -> tuple[ValueModel, int]:
    """The value model behind the policy, or heads of zeros, and the layer that it reads."""
    base = load_base(config.base.model, config.base.dtype, config.base.device)
    if fit.parent is not None:
        [objective] = fit.objectives
        model, card = load_objective(values.fetch(store, objective, fit.parent), objective, base=base)
        assert card.state_layer is not None  # of the same run
        return model, card.state_layer
    layer = state_layer(base.model.config, config.value.layers)
    model = ValueModel(first_layers(base.model, layer), len(fit.objectives)).requires_grad_(False).eval()
    model.heads.to(base.model.device)
    return model, layer


@torch.no_grad()
def errors(model: ValueModel, trees: Sequence[TreeSet], indices: Sequence[int]) -> Errors:
    """The errors of some trees as functions of heads on the model's backbone.

    Args:
        trees: the same trees for every head of the model, with the targets of its objective.
    """
    device, columns, backbone = model.heads.weight.device, [], model.backbone
    for batches in zip(*(one.batches(list(indices)) for one in trees), strict=True):
        batch, value_BXM = batches[0], torch.stack([one.value_BX for one in batches], -1)
        inputs = tree_inputs(backbone, batch.tokens_BS, batch.positions_BS, batch.mask_BSS)
        state_BXH = at_targets(backbone(**inputs).last_hidden_state, batch)
        rest = (x.to(device).flatten(0, 1) for x in (value_BXM, batch.weight_BX, batch.siblings_BX))
        columns.append([state_BXH.flatten(0, 1).float(), *rest])
    return Errors.of(*(torch.cat(column) for column in zip(*columns, strict=True)))


def fold_errors(model: ValueModel, trees: Sequence[TreeSet], group: WorkerGroup, name: str) -> list[Errors]:
    """The errors of every fold of the trees, the same on all workers, each of which computes a part; `name` is that of
    the fit in the progress.
    """
    passes = passes_over(len(trees[0]))
    mine: dict[int, Errors] = {}
    for done, (fold, indices) in enumerate(passes[group.rank :: group.size], 1):
        found = errors(model, trees, indices).cpu()
        mine[fold] = mine[fold] + found if fold in mine else found
        group.check_stop()
        group.progress(name, min(done * group.size, len(passes)), len(passes), "")
    parts = group.gather(mine)
    folds = sorted({fold for fold, _ in passes})
    return [reduce(add, (part[fold] for part in parts if fold in part)) for fold in folds]


def passes_over(num_trees: int) -> list[tuple[int, list[int]]]:
    """The fold and the indices of a few trees, until all trees have their turn."""
    order = np.random.default_rng(0).permutation(num_trees)
    return [
        (fold, part.tolist())
        for fold, indices in enumerate(np.array_split(order, min(FOLDS, num_trees)))
        for part in np.array_split(indices, -(-len(indices) // TREES_PER_PASS))
    ]


def best_heads(
    folds: Sequence[Errors], start_JM: torch.Tensor, sibling_weight: float, objectives: Sequence[str]
) -> tuple[torch.Tensor, list[Metrics]]:
    """For every objective the head with the penalty that has its smallest loss on held-out folds, [J, M], and the
    losses of all penalties.
    """
    everything, metrics, heads, scores = reduce(add, folds), list[Metrics](), [], []
    splits = [(reduce(add, [*folds[:k], *folds[k + 1 :]]), fold) for k, fold in enumerate(folds) if len(folds) > 1]
    for step, ridge in enumerate(RIDGES, 1):
        heads.append(minimum(everything, start_JM, ridge, sibling_weight))
        losses = {"loss": everything.loss(sibling_weight).at(heads[-1])}
        held_out = [
            fold.loss(sibling_weight).at(minimum(others, start_JM, ridge, sibling_weight)) for others, fold in splits
        ]
        if held_out:
            losses["held_out_loss"] = torch.stack(held_out).mean(0)
        scores.append(losses["held_out_loss"].numpy() if held_out else np.zeros(len(objectives)))
        figures = {
            objective: {name: float(loss_M[m]) for name, loss_M in losses.items()}
            for m, objective in enumerate(objectives)
        }
        metrics.append({"step": step, "epoch": 0, "ridge": ridge, FIGURES: figures})
    best_M = np.stack(scores).argmin(0)  # the first of equals: the strongest penalty
    return torch.stack([heads[step][:, m] for m, step in enumerate(best_M)], -1), metrics


def minimum(errors: Errors, start_JM: torch.Tensor, ridge: float, sibling_weight: float) -> torch.Tensor:
    """The heads [J, M] with the smallest loss plus `ridge` times their squared distance to `start_JM`, in units of the
    channels' standard deviations; the bias is free.
    """
    loss, plain = errors.loss(sibling_weight), errors.plain.mean()
    variance_J = plain.gram_JJ.diagonal() - plain.gram_JJ[-1] ** 2
    variance_J = variance_J.clamp_min(1e-6 * float(variance_J.mean()))  # a channel may be constant
    variance_J[-1] = 0.0
    gram_JJ, residual_JM = loss.gram_JJ + torch.diag(ridge * variance_J), loss.moment_JM - loss.gram_JJ @ start_JM
    return start_JM + torch.linalg.solve(gram_JJ, residual_JM)


def heads_of(model: ValueModel) -> torch.Tensor:
    """Weights and biases of a model's heads, float64 [J, M]."""
    return torch.cat([model.heads.weight.T, model.heads.bias[None]]).detach().double().cpu()


@torch.no_grad()
def set_heads(model: ValueModel, head_JM: torch.Tensor) -> None:
    model.heads.weight.copy_(head_JM[:-1].T)
    model.heads.bias.copy_(head_JM[-1])
