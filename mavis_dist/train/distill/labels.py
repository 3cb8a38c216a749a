"""Labels for distillation: the teachers' values of all tokens of stored trees, and of candidates at some states.

Sources: distillation at every answer token, arXiv 2508.13415v3; labels at candidates, whose differences to V(s) are
what a guide computes, are this project's.

Shapes: S tokens of a packed tree, X labelled tokens, P states, K candidates of a state, C candidates of all states, M
objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mavis_dist.core import noise
from mavis_dist.core.packing import PackedBatch, pack, visibility
from mavis_dist.core.tilt import candidates
from mavis_dist.core.tree import Finish, Targets, Tree
from mavis_dist.models.load import BaseModel
from mavis_dist.models.masks import tree_inputs
from mavis_dist.models.value import ValueModel
from mavis_dist.store.shards import TeacherValues

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How many candidates of a tree are labelled, and the truncated distribution that they come from."""

    states: int  # per tree
    candidates: int  # per state
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, eq=False)
class DistillLabels:
    """The teachers' values of one tree, whose last C nodes are candidates.

    The prompt's last token and all tokens after it are labelled.
    """

    tree: Tree
    state_C: np.ndarray  # int64, which labelled token each candidate follows
    values_XM: np.ndarray  # float32, the teachers' values

    @property
    def index_X(self) -> np.ndarray:
        """Labelled tokens, counted over the prompt and all segments."""
        return labelled(self.tree)

    @property
    def candidate_C(self) -> np.ndarray:
        """Which labelled tokens are the candidates."""
        num_labelled = len(self.values_XM)
        return np.arange(num_labelled - len(self.state_C), num_labelled)

    @property
    def token_C(self) -> np.ndarray:
        """The candidates, int64."""
        return self.tree.tokens[len(self.tree.tokens) - len(self.state_C) :].astype(np.int64)

    @property
    def deltas_CM(self) -> np.ndarray:
        """V_m(s∘a) - V_m(s) of the candidates."""
        return self.values_XM[self.candidate_C] - self.values_XM[self.state_C]


def labelled(tree: Tree) -> np.ndarray:
    """The prompt's last token and all tokens of segments, counted in storage order; int64 [X]."""
    return len(tree.prompt_tokens) - 1 + np.arange(len(tree.tokens) + 1)


def with_candidates(tree: Tree, state_C: np.ndarray, token_C: np.ndarray) -> Tree:
    """The tree with a node of one token appended for every candidate.

    Candidate c follows labelled token `state_C[c]` (0 is the prompt's last) and cuts the segment that holds it there.
    """
    position_C = state_C - 1  # among the tokens of segments; -1 is the prompt, whose node is ROOT, -1 as well
    node_C = np.searchsorted(tree.node_start, position_C, side="right") - 1
    cut_C = np.where(position_C < 0, 0, position_C - tree.node_start[node_C] + 1)
    count = len(state_C)

    def append(own: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.concatenate([own, more.astype(own.dtype)])

    return replace(
        tree,
        node_parent=append(tree.node_parent, node_C),
        node_cut=append(tree.node_cut, cut_C),
        node_start=append(tree.node_start, len(tree.tokens) + 1 + np.arange(count)),
        node_finish=append(tree.node_finish, np.full(count, Finish.LENGTH)),
        tokens=append(tree.tokens, token_C),
        token_logratio=append(tree.token_logratio, np.zeros(count)),
    )


def open_states(tree: Tree) -> np.ndarray:
    """Labelled tokens that a candidate can follow: all except the last tokens of answers; int64."""
    is_open_X = np.ones(len(tree.tokens) + 1, dtype=bool)
    is_open_X[tree.node_start[1:][tree.node_finish != Finish.OPEN]] = False
    return np.flatnonzero(is_open_X)


@torch.no_grad()
def propose(base: BaseModel, tree: Tree, sampling: Sampling, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States of a tree and candidates to label there: (state, token), int64 [C] each.

    The prompt is always among the states. Half of a state's candidates are drawn from the base model's truncated
    distribution, where a guide is evaluated most, the others uniformly from its other tokens; end-of-answer tokens have
    priority, as their tilt is not capped.
    """
    states = open_states(tree)
    more = rng.choice(states[1:], min(sampling.states, len(states)) - 1, replace=False)
    state_P = np.sort(np.append(more, states[0]))
    ids_PK, logprobs_PK = _distribution(base, tree, state_P, sampling)
    key_PK = _drawing_order(ids_PK, logprobs_PK, sampling.candidates, base.eos_ids, rng)
    chosen_PK = np.argsort(-key_PK, axis=-1, kind="stable")[:, : sampling.candidates]
    is_there_PK = np.take_along_axis(np.isfinite(logprobs_PK), chosen_PK, -1)
    token_PK = np.take_along_axis(ids_PK, chosen_PK, -1)
    return np.broadcast_to(state_P[:, None], token_PK.shape)[is_there_PK], token_PK[is_there_PK]


def _distribution(
    base: BaseModel, tree: Tree, state_P: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the truncated distribution at each state and their log p, [P, K] each."""
    device = base.model.device
    logits_PV = base.model(
        **packed_inputs(base.model, tree), logits_to_keep=torch.from_numpy(labelled(tree)[state_P]).to(device)
    ).logits[0]
    logits_PV = logits_PV.float().cpu()
    # An answer has at least one token.
    logits_PV[np.ix_(np.flatnonzero(state_P == 0), np.array(base.eos_ids))] = -torch.inf
    like_P = torch.ones(len(state_P))
    ids_PK, logprobs_PK = candidates(
        logits_PV, sampling.top_k * like_P.long(), sampling.top_p * like_P, sampling.min_p * like_P, like_P
    )
    return ids_PK.numpy(), logprobs_PK.numpy()


def _drawing_order(
    ids_PK: np.ndarray, logprobs_PK: np.ndarray, count: int, eos_ids: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """Keys [P, K]: candidates with the largest keys are chosen (Gumbel-top-k, arXiv 1903.06059)."""
    drawn_PK = logprobs_PK + rng.gumbel(size=ids_PK.shape)
    is_drawn_PK = (-drawn_PK).argsort(-1).argsort(-1) < -(-count // 2)
    key_PK = rng.uniform(size=ids_PK.shape) + is_drawn_PK + 2.0 * np.isin(ids_PK, eos_ids)
    return np.where(np.isfinite(logprobs_PK), key_PK, -np.inf)


def packed_inputs(model: PreTrainedModel, tree: Tree) -> dict[str, Any]:
    """Arguments of a Hugging Face decoder for one packed tree."""
    positions_S, mask_SS = visibility(tree)
    tokens_S = np.concatenate([tree.prompt_tokens, tree.tokens]).astype(np.int64)
    return tree_inputs(model, *(torch.from_numpy(x)[None] for x in (tokens_S, positions_S, mask_SS)))


@torch.no_grad()
def values_of(model: ValueModel, tree: Tree) -> np.ndarray:
    """All heads' values of the labelled tokens of a tree; float32 [X, M]."""
    values_SM = model(**packed_inputs(model.backbone, tree))[0]
    return values_SM[labelled(tree)].float().cpu().numpy()


def label_tree(
    base: BaseModel,
    teachers: Sequence[tuple[ValueModel, int]],
    tree: Tree,
    sampling: Sampling,
    seed: int,
) -> DistillLabels:
    """Add candidates to a tree, and label all of its tokens with every teacher, a model and one of its heads."""
    stream = noise.stream(seed, "candidates", tree.policy, tree.prompt_id)
    state_C, token_C = propose(base, tree, sampling, np.random.default_rng(stream % 2**63))
    extended = with_candidates(tree, state_C, token_C)
    models = {id(model): model for model, _ in teachers}  # objectives of one model share its pass
    known = {key: values_of(model, extended) for key, model in models.items()}
    columns = [known[id(model)][:, head] for model, head in teachers]
    return DistillLabels(extended, state_C, np.stack(columns, -1))


def to_store(labels: DistillLabels) -> TeacherValues:
    """The labels without their tree."""
    tree = labels.tree
    state_C, token_C = labels.state_C.astype(np.int32), labels.token_C.astype(np.int32)
    return TeacherValues(tree.prompt_id, tree.policy, state_C, token_C, labels.values_XM.reshape(-1))


def from_store(tree: Tree, found: TeacherValues, num_teachers: int) -> DistillLabels:
    """The labels of a tree without candidates, from what `to_store` gave."""
    state_C = found.state.astype(np.int64)
    values_XM = found.values.reshape(-1, num_teachers)
    return DistillLabels(with_candidates(tree, state_C, found.candidate.astype(np.int64)), state_C, values_XM)


@dataclass(frozen=True, eq=False)
class DistillBatch:
    """Labels of several trees, padded; candidates are counted over all trees."""

    packed: PackedBatch  # its targets are the labelled tokens; their weight is 1, and 0 where padded
    values_BXM: torch.Tensor  # float32
    tree_C: torch.Tensor  # int64, the tree of each candidate
    state_C: torch.Tensor  # int64, the packed token that it follows
    candidate_C: torch.Tensor  # int64, the packed token that it is
    token_C: torch.Tensor  # int64
    deltas_CM: torch.Tensor  # float32


def collate(labels: Sequence[DistillLabels], device: torch.device | str = "cpu") -> DistillBatch:
    """One padded batch."""
    zeros = [np.zeros(len(label.values_XM), dtype=np.int32) for label in labels]
    targets = [
        Targets(x.index_X, zero.astype(np.float32), zero, zero - 1) for x, zero in zip(labels, zeros, strict=True)
    ]
    packed = pack([label.tree for label in labels], targets, np.ones(1))
    values_BXM = torch.zeros(*packed.index_BX.shape, labels[0].values_XM.shape[1])
    for row, label in enumerate(labels):
        values_BXM[row, : len(label.values_XM)] = torch.from_numpy(label.values_XM)
    counts = [len(label.state_C) for label in labels]
    tree_C = np.arange(len(labels)).repeat(counts)
    parts = [(x.index_X[x.state_C], x.index_X[x.candidate_C], x.token_C, x.deltas_CM) for x in labels]
    columns = [tree_C, *(np.concatenate(column) for column in zip(*parts, strict=True))]
    return DistillBatch(
        PackedBatch(**{field.name: getattr(packed, field.name).to(device) for field in fields(packed)}),
        values_BXM.to(device),
        *(torch.from_numpy(column).to(device) for column in columns),
    )
