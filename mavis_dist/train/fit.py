"""One training worker: fits the value model of one objective to its trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mavis_dist.config import Config
from mavis_dist.core import noise
from mavis_dist.core.packing import PackedBatch
from mavis_dist.models.masks import tree_inputs
from mavis_dist.sections import Train
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.train.checkpoints import Checkpoints, State
from mavis_dist.train.data import Data, Fit, TreeSet, data_of, passes, steps
from mavis_dist.train.engine import make_engine, trained_state
from mavis_dist.train.journal import FIGURES, Journal, Metrics
from mavis_dist.train.metrics import Predictions, ceilings, sibling_tests, summary
from mavis_dist.train.model import make_card, merge_adapters, store_model, trainable_model
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import R2_KEY


class ValueFunction(Protocol):
    """A value model, or a DeepSpeed engine around one."""

    backbone: Any

    def __call__(self, **inputs: Any) -> torch.Tensor: ...


def outputs(model: ValueFunction, batch: PackedBatch) -> torch.Tensor:
    """What the model's heads say at all tokens of packed trees, [B, S, M]."""
    return model(**tree_inputs(model.backbone, batch.tokens_BS, batch.positions_BS, batch.mask_BSS))


def at_targets(outputs_BSM: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Outputs at the targets of packed trees, [B, X, M]."""
    index_BX = batch.index_BX.to(outputs_BSM.device)
    return outputs_BSM.gather(1, index_BX[..., None].expand(-1, -1, outputs_BSM.shape[-1]))


def target_errors(outputs_BSM: torch.Tensor, batches: Sequence[PackedBatch]) -> torch.Tensor:
    """Output less target [B, X, M]; `batches` are the same trees with the targets of each head."""
    target_BXM = torch.stack([batch.value_BX for batch in batches], -1)
    return at_targets(outputs_BSM, batches[0]) - target_BXM.to(outputs_BSM.device)


def squared_error(
    model: ValueFunction, trees: TreeSet, indices: list[int], device: str, one_batch: bool = False
) -> torch.Tensor:
    """Sum over the targets of some trees of weight * (V - target)^2; a scalar.

    `one_batch` calls the model once, as ZeRO 3 needs: all workers must gather parameters at the same time.
    """
    return errors(model, [trees], indices, device, one_batch).squared


class Errors(NamedTuple):
    """Sums over the targets of some trees, means over the objectives; scalars."""

    squared: torch.Tensor  # weight * (V - target)^2
    sibling: torch.Tensor  # squared error of the differences to the mean of siblings, where there are any
    prefix: torch.Tensor  # squared error of the rewards of answers, finished or not


def errors(
    model: ValueFunction,
    trees: Sequence[TreeSet],
    indices: list[int],
    device: str,
    one_batch: bool = False,
    prefixes: Sequence[TreeSet] = (),
) -> Errors:
    """The errors that the loss consists of; `one_batch` as in `squared_error`.

    Args:
        trees: the same trees for every head of the model, with the targets of its objective.
        prefixes: the same trees once more, for as many further heads that predict rewards of unfinished answers.
    """
    squared = prefix = torch.zeros((), device=device)
    compared, num = [], len(trees)
    sets = (*trees, *prefixes)
    for batches in zip(*([t.batch(indices)] if one_batch else t.batches(indices) for t in sets), strict=True):
        batch, outputs_BSM = batches[0], outputs(model, batches[0])
        error_BXM = target_errors(outputs_BSM[..., :num], batches[:num])
        squared = squared + weighted_square(error_BXM, batch)
        compared.append((error_BXM.flatten(0, 1), batch.siblings_BX.to(device).flatten()))
        if prefixes:
            prefix = prefix + weighted_square(target_errors(outputs_BSM[..., num:], batches[num:]), batches[num])
    error_XM, siblings_X = (torch.cat(column) for column in zip(*compared, strict=True))
    return Errors(squared, sibling_error(error_XM, siblings_X) / num, prefix)


def weighted_square(error_BXM: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sum over targets of weight * error^2, the mean over heads."""
    return (batch.weight_BX.to(error_BXM.device)[..., None] * error_BXM**2).sum() / error_BXM.shape[-1]


def sibling_error(error_XM: torch.Tensor, siblings_X: torch.Tensor) -> torch.Tensor:
    """Sum of the squared distances between errors V - target and their mean over siblings: the squared error of
    differences, which are all that steering uses. An error that siblings share costs nothing.
    """
    is_compared_X = siblings_X >= 0
    return (centred(error_XM[is_compared_X], siblings_X[is_compared_X]) ** 2).sum()


def centred(x_YC: torch.Tensor, siblings_Y: torch.Tensor) -> torch.Tensor:
    """Differences to the mean over siblings, [Y, C]."""
    _, group_Y, count_G = siblings_Y.unique(return_inverse=True, return_counts=True)
    sum_GC = x_YC.new_zeros(len(count_G), x_YC.shape[1]).index_add(0, group_Y, x_YC)
    return x_YC - (sum_GC / count_G[:, None])[group_Y]


@torch.no_grad()
def predict(model: ValueFunction, trees: Sequence[TreeSet]) -> list[Predictions]:
    """The values of every head at the targets of all trees, one tree at a time; `trees` as in `errors`."""
    parts = []
    for i in range(len(trees[0])):
        batches = [one.batch([i]) for one in trees]
        pred_XM = at_targets(outputs(model, batches[0]), batches[0])[0].double().cpu().numpy()
        target_XM = np.stack([batch.value_BX[0].double().numpy() for batch in batches], -1)
        parts.append((pred_XM, target_XM, batches[0].weight_BX[0].double().numpy(), trees[0].targets[i].depth_X))
    pred_XM, target_XM, weight_X, depth_X = (np.concatenate(column) for column in zip(*parts, strict=True))
    return [Predictions(pred_XM[:, m], target_XM[:, m], weight_X, depth_X) for m in range(len(trees))]


def validate(model: ValueFunction, trees: Sequence[TreeSet]) -> list[dict[str, float]]:
    """All figures of every head on some trees: R², its ceiling, calibration, sibling tests; none without trees."""
    if len(trees[0]) == 0:
        return [{} for _ in trees]
    return [
        {**summary(p), **ceilings(p, one.noise), **sibling_tests(p, one.trees, one.targets)}
        for p, one in zip(predict(model, trees), trees, strict=True)
    ]


def train(fit: Fit, config: Config, store: Store, group: WorkerGroup) -> bool:
    """Train, and store the epoch with the best R² on the validation trees.

    Resumes from the newest checkpoint of an earlier attempt. Returns False if asked to stop, after saving a checkpoint.
    The loss of a step is the mean over all targets of its trees, however they are spread over workers and passes.
    """
    device, settings = config.base.device, config.train
    data = data_of(fit, config, store)
    schedule = [
        (epoch, indices)
        for epoch in range(settings.epochs)
        for indices in steps(data.training[0].lengths, settings.trees_per_step, epoch, config.seed)
    ]
    torch.manual_seed(config.seed)  # adapters start at random
    model = trainable_model(fit, config, store)
    for _ in data.prefixes:
        model.add_objective()
    model.to(device)
    trees_per_pass = settings.trees_per_step // (group.size * settings.accumulation)
    engine = make_engine(model, settings, len(schedule), trees_per_pass)
    checkpoints = Checkpoints(store, layout.checkpoint_folder(fit.name, fit.iteration), group, settings)
    state = checkpoints.load(engine)
    journal = (
        Journal(store.uri(layout.tensorboard_folder(fit.name, fit.iteration)), state.step) if group.rank == 0 else None
    )

    engine.train()
    while state.step < len(schedule) and not stops_early(state, schedule[state.step][0], settings.patience):
        epoch, indices = schedule[state.step]
        torch.manual_seed(noise.stream(config.seed, state.step, group.rank))  # dropout
        loss = take_step(engine, data, indices, group, settings, device)
        state.step += 1
        record({"step": state.step, "epoch": epoch, "loss": loss, "learning_rate": engine.get_lr()[0]}, state, journal)
        group.progress(fit.name, state.step, len(schedule), f"loss {loss:.3f}")
        ends_epoch = state.step % (len(schedule) // settings.epochs) == 0
        if ends_epoch:
            end_epoch(engine, fit.objectives, data.validation, epoch, state, journal, group)
        if checkpoints.save_if_due(engine, state, ends_epoch):
            return False
    group.progress(fit.name, len(schedule), len(schedule), "done")
    if group.rank == 0:
        store_best(fit, config, store, state)
        checkpoints.delete()
    group.barrier()
    return True


def take_step(
    engine: Any,
    data: Data,
    indices: list[int],
    group: WorkerGroup,
    settings: Train,
    device: str,
) -> float:
    """One optimiser step on some trees; returns the loss over all workers."""
    accumulation, one_batch = settings.accumulation, settings.zero_stage == 3
    training, prefixes = data.training, data.prefixes
    total_weight, num_siblings = training[0].total_weight(indices), max(1, training[0].num_siblings(indices))
    num_prefixes = prefixes[0].total_weight(indices) if prefixes else 1.0
    mine = 0.0
    for part in passes(indices, group.rank, group.size, accumulation):
        # Workers make the same number of passes: one without a tree adds a zero of the right shape.
        found = errors(engine, training, part or indices[:1], device, one_batch, prefixes)
        share = found.squared / total_weight + settings.sibling_weight * found.sibling / num_siblings
        share = share + found.prefix / num_prefixes
        share = share * (1.0 if part else 0.0)
        # DeepSpeed averages over workers and passes.
        engine.backward(share * (group.size * accumulation))
        engine.step()
        mine += share.item()
    return group.sum(mine)


def end_epoch(
    engine: Any,
    objectives: Sequence[str],
    validation: Sequence[TreeSet],
    epoch: int,
    state: State,
    journal: Journal | None,
    group: WorkerGroup,
) -> None:
    """Evaluate on the validation trees, and keep the parameters if they are the best so far."""
    engine.eval()
    figures = dict(zip(objectives, validate(engine, validation), strict=True))
    engine.train()
    r2 = mean_r2(figures)
    if r2 is not None:
        record({"step": state.step, "epoch": epoch, FIGURES: figures}, state, journal)
    score = float(epoch) if r2 is None else r2  # without validation the last epoch counts as best
    if state.best_score is None or score > state.best_score:
        weights = trained_state(engine)
        state.best_score, state.best_epoch, state.best_figures = score, epoch, figures
        state.best = weights if group.rank == 0 else {}


def stops_early(state: State, epochs_so_far: int, patience: int | None) -> bool:
    """Whether validation has not improved for `patience` epochs."""
    return patience is not None and epochs_so_far - state.best_epoch > patience


def mean_r2(figures: Mapping[str, Mapping[str, float]]) -> float | None:
    """The mean over objectives; None without validation."""
    found = [of_objective[R2_KEY] for of_objective in figures.values() if of_objective]
    return float(np.mean(found)) if found else None


def record(entry: Metrics, state: State, journal: Journal | None) -> None:
    state.metrics.append(entry)
    if journal is not None:
        journal.write(entry)


def store_best(fit: Fit, config: Config, store: Store, state: State) -> None:
    """Write the value model of the best epoch, and all figures."""
    # A fresh copy: under ZeRO 3 the parameters of the trained one are sharded.
    model = trainable_model(fit, config, store)
    # Without the heads of prefixes, which only training needs.
    best = {
        name: weights[: len(fit.objectives)] if name.startswith("heads.") else weights
        for name, weights in state.best.items()
    }
    unknown = model.load_state_dict(best, strict=False).unexpected_keys
    assert not unknown, unknown
    card = make_card(fit, config, mean_r2(state.best_figures))
    about = {"steps": state.step, "epoch": state.best_epoch}
    store_model(fit, store, merge_adapters(model), card, state.metrics, state.best_figures, about)
