"""Several value models in one: a shared trunk with a head per objective, and a student that predicts candidates.

First trunk and heads learn the teachers' values of every token and candidate, with the student's head beside them; then
the heads alone, on the trunk as it has become. Another objective later is the second part only: the trunk and the other
heads stay as they are, bit for bit.

Sources: one model with a head per objective and a phase for the heads alone, arXiv 2508.13415v3; candidates as labels,
least squares for the heads, and the student are this project's.

Shapes: S tokens of a packed tree, X labelled tokens, P states, C candidates, M objectives, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mavis_dist.models.qhead import QHead, Student, deltas
from mavis_dist.models.value import ValueModel
from mavis_dist.train.data import steps
from mavis_dist.train.lessons import Lesson, LessonBatch, batch, packed_inputs

RIDGE = 1e-4  # of the heads' least squares, in units of the mean square of a hidden unit
CANDIDATES_PER_STEP = 2048  # of the student's head, over all workers

Progress = Callable[[str, int, int, str], None]  # (part of the work, done, total, text)


class Pupil(nn.Module):
    """A student with the errors that it learns by."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, lesson: LessonBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared errors of all values, of the candidates' deltas as differences of values, and of the same deltas as
        the student's head predicts them; summed over tokens and objectives, scalars.

        Deltas steer, and they are smaller than values: what is negligible in a value may be all of a delta.
        """
        model, packed = self.student.model, lesson.packed
        hidden_BSH = model.backbone(
            input_ids=packed.tokens_BS,
            position_ids=packed.positions_BS,
            attention_mask=packed.mask_B1SS,
            use_cache=False,
        ).last_hidden_state.float()
        values_BSM = model.heads(hidden_BSH)
        said_BXM = values_BSM.gather(1, packed.index_BX[..., None].expand_as(lesson.values_BXM))
        error_BXM = packed.weight_BX[..., None] * (said_BXM - lesson.values_BXM) ** 2
        at = lesson.tree_C
        differences_CM = values_BSM[at, lesson.candidate_C] - values_BSM[at, lesson.state_C]
        embedding_CH = model.backbone.get_input_embeddings()(lesson.token_C)
        predicted_CM = deltas(self.student.qhead, hidden_BSH[at, lesson.state_C], embedding_CH)
        errors = (((said_CM - lesson.deltas_CM) ** 2).sum() for said_CM in (differences_CM, predicted_CM))
        return error_BXM.sum(), *errors


def fit_trunk(
    student: Student, lessons: Sequence[Lesson], settings: dict[str, Any], epochs: int, seed: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """Train everything but the token embeddings; the trained parameters of the student by name.

    `settings` is the `train` section of the config. The loss of a step is the mean over all values of its trees plus
    the means over all deltas, however the trees are spread over the workers. Needs a process group.
    """
    from mavis_dist.train.engine import make_engine, trained_state

    rank, world_size, device = dist.get_rank(), dist.get_world_size(), student.device
    per_step = settings["trees_per_step"]
    student.requires_grad_(True)
    student.model.backbone.get_input_embeddings().requires_grad_(False)
    num_steps = epochs * math.ceil(len(lessons) / per_step)
    engine = make_engine(Pupil(student), settings, num_steps, per_step // world_size)
    engine.train()
    lengths = [len(lesson.tree.prompt_tokens) + len(lesson.tree.tokens) for lesson in lessons]
    done = 0
    for epoch in range(epochs):
        for indices in steps(lengths, per_step, epoch, seed):
            mine = indices[rank::world_size]
            num_values = sum(lessons[i].values_XM.size for i in indices)
            num_deltas = sum(lessons[i].deltas_CM.size for i in indices)
            values, *candidates = engine(batch([lessons[i] for i in mine or indices[:1]], device))
            # Workers average their gradients; one without a tree adds a zero of the right shape.
            share = world_size if mine else 0.0
            loss = share * (values / num_values + sum(candidates) / num_deltas)
            engine.backward(loss)
            engine.step()
            done += 1
            progress("trunk", done, num_steps, f"loss {loss.item():.4f}")
    prefix = "student."
    return {name.removeprefix(prefix): tensor for name, tensor in trained_state(engine).items()}


@dataclass(frozen=True, eq=False)
class Survey:
    """What the heads need of the frozen trunk."""

    gram_HH: torch.Tensor  # float64, of hidden states with a constant 1 behind them, and of their differences
    moment_HM: torch.Tensor  # float64, of the same and of what the heads miss of the teachers' values and deltas
    state_CH: torch.Tensor  # hidden states that candidates follow
    token_C: torch.Tensor
    deltas_CM: torch.Tensor


@torch.no_grad()
def survey(model: ValueModel, lessons: Sequence[Lesson]) -> Survey:
    """One forward pass over all lessons."""
    device = model.heads.weight.device
    size = model.heads.in_features + 1
    gram_HH = torch.zeros(size, size, dtype=torch.float64, device=device)
    moment_HM = torch.zeros(size, model.heads.out_features, dtype=torch.float64, device=device)
    states = []
    for lesson in lessons:
        hidden_SH = model.backbone(**packed_inputs(lesson.tree, device)).last_hidden_state[0].float()
        index_X, state_C, candidate_C = (
            torch.from_numpy(x).to(device) for x in (lesson.index_X, lesson.state_C, lesson.candidate_C)
        )
        hidden_XH = hidden_SH[index_X]
        missed_XM = (torch.from_numpy(lesson.values_XM).to(device) - model.heads(hidden_XH)).double()
        with_one_XH = F.pad(hidden_XH, (0, 1), value=1.0).double()
        for x_YH, missed_YM in (
            (with_one_XH, missed_XM),
            (with_one_XH[candidate_C] - with_one_XH[state_C], missed_XM[candidate_C] - missed_XM[state_C]),
        ):
            gram_HH += x_YH.T @ x_YH / len(x_YH)
            moment_HM += x_YH.T @ missed_YM / len(x_YH)
        states.append(hidden_XH[state_C])
    return Survey(
        gram_HH,
        moment_HM,
        torch.cat(states),
        torch.from_numpy(np.concatenate([lesson.token_C for lesson in lessons])).to(device),
        torch.from_numpy(np.concatenate([lesson.deltas_CM for lesson in lessons])).to(device),
    )


@torch.no_grad()
def fit_heads(model: ValueModel, seen: Survey, first: int = 0) -> None:
    """Give the heads from `first` on the least squared error of values and deltas that the frozen trunk allows.

    That is linear regression, solved at once (ridge regression around the heads as they are).
    """
    size = len(seen.gram_HH)
    ridge = RIDGE * seen.gram_HH.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=seen.gram_HH.device)
    change_HM = torch.linalg.solve(seen.gram_HH + ridge, seen.moment_HM).float()
    model.heads.weight[first:] += change_HM[:-1, first:].T
    model.heads.bias[first:] += change_HM[-1, first:]


def fit_qhead(
    student: Student,
    seen: Survey,
    settings: dict[str, Any],
    num_steps: int,
    seed: int,
    progress: Progress,
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Train the student's head on hidden states that stay as they are, or, with `first` > 0, its part for the
    objectives from `first` on; the trained parameters by name. Needs a process group.
    """
    from mavis_dist.train.engine import make_engine, trained_state

    rank, world_size = dist.get_rank(), dist.get_world_size()
    qhead, embed = student.qhead, student.model.backbone.get_input_embeddings()
    qhead.requires_grad_(first == 0)
    qhead.queries[first:].requires_grad_(True)
    # A value is a small difference, and the head is small: single precision.
    engine = make_engine(_Predictor(qhead), settings | {"dtype": "float32", "warmup": 0.05}, num_steps, 1)
    rng = np.random.default_rng(seed)
    for done in range(num_steps):
        chosen = rng.integers(len(seen.token_C), size=CANDIDATES_PER_STEP)
        mine = torch.from_numpy(chosen[rank::world_size]).to(seen.token_C.device)
        said_CM = engine(seen.state_CH[mine], embed(seen.token_C[mine]).float())
        loss = F.mse_loss(said_CM[:, first:], seen.deltas_CM[mine, first:])
        engine.backward(loss)
        engine.step()
        progress("student", done + 1, num_steps, f"loss {loss.item():.4f}")
    return {name.removeprefix("qhead."): tensor for name, tensor in trained_state(engine).items()}


class _Predictor(nn.Module):
    def __init__(self, qhead: QHead):
        super().__init__()
        self.qhead = qhead

    def forward(self, state_CH: torch.Tensor, embedding_CH: torch.Tensor) -> torch.Tensor:
        return deltas(self.qhead, state_CH, embedding_CH)


@torch.no_grad()
def agreement(student: Student, lessons: Sequence[Lesson]) -> dict[str, np.ndarray | None]:
    """R^2 [M] to the teachers of the student's values, of its differences V(s∘a) - V(s), and of the deltas that its
    head predicts; None without lessons.
    """
    device, embed = student.device, student.model.backbone.get_input_embeddings()
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"r2_values": [], "r2_differences": [], "r2_deltas": []}
    for lesson in lessons:
        hidden_SH = student.model.backbone(**packed_inputs(lesson.tree, device)).last_hidden_state[0].float()
        hidden_XH = hidden_SH[torch.from_numpy(lesson.index_X).to(device)]
        values_XM = student.model.heads(hidden_XH).cpu().numpy()
        embedding_CH = embed(torch.from_numpy(lesson.token_C).to(device)).float()
        state_CH = hidden_XH[torch.from_numpy(lesson.state_C).to(device)]
        predicted_CM = deltas(student.qhead, state_CH, embedding_CH).cpu().numpy()
        parts["r2_values"].append((values_XM, lesson.values_XM))
        parts["r2_differences"].append((values_XM[lesson.candidate_C] - values_XM[lesson.state_C], lesson.deltas_CM))
        parts["r2_deltas"].append((predicted_CM, lesson.deltas_CM))
    return {name: _determination(pairs) if pairs else None for name, pairs in parts.items()}


def _determination(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """1 - squared error / variance, by column."""
    said_XM, wanted_XM = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return 1 - ((said_XM - wanted_XM) ** 2).sum(0) / ((wanted_XM - wanted_XM.mean(0)) ** 2).sum(0)
