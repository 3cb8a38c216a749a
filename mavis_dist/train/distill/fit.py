"""Training of a student: a shared trunk with a value head per objective, and a QHead that predicts candidates.

The first phase trains all of it on the teachers' values of every token and candidate; the second fits the value heads
and the QHead on the frozen trunk. Adding an objective later needs only the second phase: the trunk and the other heads
stay bit-identical.

Sources: one model with a head per objective and a phase for the heads alone, arXiv 2508.13415v3; labels at candidates,
least squares for the heads, and the QHead are this project's.

Shapes: S tokens of a packed tree, X labelled tokens, P states, C candidates, M objectives, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mavis_dist.core import noise
from mavis_dist.models.masks import tree_inputs
from mavis_dist.models.qhead import QHead, Student, deltas
from mavis_dist.models.value import ValueModel
from mavis_dist.sections import Train
from mavis_dist.train.checkpoints import Checkpoints
from mavis_dist.train.data import steps
from mavis_dist.train.distill.labels import DistillBatch, DistillLabels, collate, packed_inputs
from mavis_dist.train.metrics import r2
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import Stopped

RIDGE = 1e-4  # of the heads' least squares, in units of the mean square of a hidden unit
CANDIDATES_PER_STEP = 2048  # of the QHead, over all workers


class DistillLoss(nn.Module):
    """A student with its training errors."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, batch: DistillBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared errors of all values, of the candidates' deltas as differences of values, and of the deltas that the
        QHead predicts; summed over tokens and objectives, scalars.

        Deltas steer, and they are much smaller than values: an error that is negligible in a value may not be in a
        delta.
        """
        model, packed = self.student.model, batch.packed
        inputs = tree_inputs(model.backbone, packed.tokens_BS, packed.positions_BS, packed.mask_BSS)
        hidden_BSH = model.backbone(**inputs).last_hidden_state.float()
        values_BSM = model.heads(hidden_BSH)
        pred_BXM = values_BSM.gather(1, packed.index_BX[..., None].expand_as(batch.values_BXM))
        error_BXM = packed.weight_BX[..., None] * (pred_BXM - batch.values_BXM) ** 2
        tree_C = batch.tree_C
        differences_CM = values_BSM[tree_C, batch.candidate_C] - values_BSM[tree_C, batch.state_C]
        embedding_CH = model.backbone.get_input_embeddings()(batch.token_C)
        predicted_CM = deltas(self.student.qhead, hidden_BSH[tree_C, batch.state_C], embedding_CH)
        errors = (((pred_CM - batch.deltas_CM) ** 2).sum() for pred_CM in (differences_CM, predicted_CM))
        return error_BXM.sum(), *errors


def fit_trunk(
    student: Student,
    labels: Sequence[DistillLabels],
    settings: Train,
    epochs: int,
    seed: int,
    group: WorkerGroup,
    checkpoints: Checkpoints,
) -> dict[str, torch.Tensor]:
    """Train everything except the token embeddings; returns the trained parameters of the student by name.

    The loss of a step is the mean over all values of its trees plus the means over all deltas, however the trees are
    spread over the workers. Needs a process group. Resumes from the newest checkpoint.

    Raises:
        Stopped: the driver has asked for a stop; a checkpoint is saved.
    """
    from mavis_dist.train.engine import make_engine, trained_state

    rank, world_size, device = group.rank, group.size, student.device
    per_step = settings.trees_per_step
    student.requires_grad_(True)
    student.model.backbone.get_input_embeddings().requires_grad_(False)
    lengths = [len(label.tree.prompt_tokens) + len(label.tree.tokens) for label in labels]
    schedule = [indices for epoch in range(epochs) for indices in steps(lengths, per_step, epoch, seed)]
    engine = make_engine(DistillLoss(student), settings, len(schedule), per_step // world_size)
    state = checkpoints.load(engine)
    engine.train()
    while state.step < len(schedule):
        indices = schedule[state.step]
        mine = indices[rank::world_size]
        num_values = sum(labels[i].values_XM.size for i in indices)
        num_deltas = sum(labels[i].deltas_CM.size for i in indices)
        torch.manual_seed(noise.stream(seed, state.step, rank))  # dropout
        values, *candidates = engine(collate([labels[i] for i in mine or indices[:1]], device))
        # Workers average their gradients; one without a tree adds a zero of the right shape.
        share = world_size if mine else 0.0
        loss = share * (values / num_values + sum(candidates) / num_deltas)
        engine.backward(loss)
        engine.step()
        state.step += 1
        group.progress("trunk", state.step, len(schedule), f"loss {loss.item():.4f}")
        if checkpoints.save_if_due(engine, state, state.step == len(schedule)):
            raise Stopped
    prefix = "student."
    return {name.removeprefix(prefix): tensor for name, tensor in trained_state(engine).items()}


@dataclass(frozen=True, eq=False)
class TrunkStatistics:
    """What the heads are fitted to: hidden states of the frozen trunk, and the labels of candidates."""

    gram_HH: torch.Tensor  # float64, of hidden states with a 1 appended, and of their differences
    moment_HM: torch.Tensor  # float64, of these and the residuals of values and deltas
    state_CH: torch.Tensor  # hidden states that candidates follow
    token_C: torch.Tensor
    deltas_CM: torch.Tensor


@torch.no_grad()
def trunk_statistics(model: ValueModel, labels: Sequence[DistillLabels], group: WorkerGroup) -> TrunkStatistics:
    """One forward pass over every labelled tree, on every worker."""
    device = model.heads.weight.device
    size = model.heads.in_features + 1
    gram_HH = torch.zeros(size, size, dtype=torch.float64, device=device)
    moment_HM = torch.zeros(size, model.heads.out_features, dtype=torch.float64, device=device)
    states = []
    for done, label in enumerate(labels):
        hidden_SH = model.backbone(**packed_inputs(model.backbone, label.tree)).last_hidden_state[0].float()
        index_X, state_C, candidate_C = (
            torch.from_numpy(x).to(device) for x in (label.index_X, label.state_C, label.candidate_C)
        )
        hidden_XH = hidden_SH[index_X]
        residual_XM = (torch.from_numpy(label.values_XM).to(device) - model.heads(hidden_XH)).double()
        with_one_XH = F.pad(hidden_XH, (0, 1), value=1.0).double()
        for x_YH, residual_YM in (
            (with_one_XH, residual_XM),
            (with_one_XH[candidate_C] - with_one_XH[state_C], residual_XM[candidate_C] - residual_XM[state_C]),
        ):
            gram_HH += x_YH.T @ x_YH / len(x_YH)
            moment_HM += x_YH.T @ residual_YM / len(x_YH)
        states.append(hidden_XH[state_C])
        group.check_stop()
        group.progress("states", done + 1, len(labels), "")
    return TrunkStatistics(
        gram_HH,
        moment_HM,
        torch.cat(states),
        torch.from_numpy(np.concatenate([label.token_C for label in labels])).to(device),
        torch.from_numpy(np.concatenate([label.deltas_CM for label in labels])).to(device),
    )


@torch.no_grad()
def fit_heads(model: ValueModel, statistics: TrunkStatistics, first: int = 0) -> None:
    """Fit the heads from index `first` on to values and deltas, in closed form: ridge regression around the current
    heads on the frozen trunk.
    """
    size = len(statistics.gram_HH)
    gram_HH = statistics.gram_HH
    ridge = RIDGE * gram_HH.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=gram_HH.device)
    change_HM = torch.linalg.solve(gram_HH + ridge, statistics.moment_HM).float()
    model.heads.weight[first:] += change_HM[:-1, first:].T
    model.heads.bias[first:] += change_HM[-1, first:]


def fit_qhead(
    student: Student,
    statistics: TrunkStatistics,
    settings: Train,
    num_steps: int,
    seed: int,
    group: WorkerGroup,
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Train the QHead on frozen hidden states; returns the trained parameters by name. Needs a process group.

    With `first` > 0 only its part for the objectives from index `first` on is trained.
    """
    from mavis_dist.train.engine import make_engine, trained_state

    rank, world_size = group.rank, group.size
    qhead, embed = student.qhead, student.model.backbone.get_input_embeddings()
    qhead.requires_grad_(first == 0)
    qhead.queries[first:].requires_grad_(True)
    # Deltas are small differences, and the head is small: train in single precision.
    engine = make_engine(
        _Predictor(qhead), settings.model_copy(update={"dtype": "float32", "warmup": 0.05}), num_steps, 1
    )
    rng = np.random.default_rng(seed)
    for done in range(num_steps):
        chosen = rng.integers(len(statistics.token_C), size=CANDIDATES_PER_STEP)
        mine = torch.from_numpy(chosen[rank::world_size]).to(statistics.token_C.device)
        pred_CM = engine(statistics.state_CH[mine], embed(statistics.token_C[mine]).float())
        loss = F.mse_loss(pred_CM[:, first:], statistics.deltas_CM[mine, first:])
        engine.backward(loss)
        engine.step()
        group.check_stop()
        group.progress("student", done + 1, num_steps, f"loss {loss.item():.4f}")
    return {name.removeprefix("qhead."): tensor for name, tensor in trained_state(engine).items()}


class _Predictor(nn.Module):
    def __init__(self, qhead: QHead):
        super().__init__()
        self.qhead = qhead

    def forward(self, state_CH: torch.Tensor, embedding_CH: torch.Tensor) -> torch.Tensor:
        return deltas(self.qhead, state_CH, embedding_CH)


@torch.no_grad()
def agreement(student: Student, labels: Sequence[DistillLabels]) -> dict[str, np.ndarray | None]:
    """R² [M] of the student's values, of its differences V(s∘a) - V(s), and of the deltas that its QHead predicts, all
    against the teachers; None without labels.
    """
    device, backbone = student.device, student.model.backbone
    embed = backbone.get_input_embeddings()
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"r2_values": [], "r2_differences": [], "r2_deltas": []}
    for label in labels:
        hidden_SH = backbone(**packed_inputs(backbone, label.tree)).last_hidden_state[0].float()
        hidden_XH = hidden_SH[torch.from_numpy(label.index_X).to(device)]
        values_XM = student.model.heads(hidden_XH).cpu().numpy()
        embedding_CH = embed(torch.from_numpy(label.token_C).to(device)).float()
        state_CH = hidden_XH[torch.from_numpy(label.state_C).to(device)]
        predicted_CM = deltas(student.qhead, state_CH, embedding_CH).cpu().numpy()
        parts["r2_values"].append((values_XM, label.values_XM))
        parts["r2_differences"].append((values_XM[label.candidate_C] - values_XM[label.state_C], label.deltas_CM))
        parts["r2_deltas"].append((predicted_CM, label.deltas_CM))
    return {
        name: r2(*(np.concatenate(column) for column in zip(*pairs, strict=True))) if pairs else None
        for name, pairs in parts.items()
    }
