"""The student: a value model with a low-rank head that predicts what each next token adds to the value.

    delta_m(s, a)  =  q_m(h(s)) · e(a),     q_m(h) = A_m g(h),     e(a) = E g'(token embedding of a)

h(s) is the trunk's hidden state; g, g' (layers with GELU) and E are shared by all objectives. One forward pass of the
trunk over s thus serves every candidate of every objective; a value model needs one over s∘a per candidate.

Sources: per-token predictions from the state alone, as in VAS (arXiv 2405.06639), GenARM (2410.08193) and Q#
(2502.20548); the low-rank form over shared token factors is this project's.

Shapes: X tokens of any layout, N and C candidates, M objectives, R rank, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mavis_dist.models.value import ValueModel, ValueModelError

QHEAD_FILE = "qhead.safetensors"


class QHead(nn.Module):
    """delta_m(s, a) of low rank, in standard deviations of the rewards; initially 0."""

    def __init__(self, width: int, num_objectives: int, rank: int):
        super().__init__()
        self.state = nn.Linear(width, width)
        self.token = nn.Linear(width, width)
        self.factors = nn.Linear(width, rank)
        # One map per objective: adding an objective does not change the arithmetic of the others.
        self.queries = nn.ModuleList([_zero_linear(width, rank) for _ in range(num_objectives)])

    @property
    def rank(self) -> int:
        return self.factors.out_features

    def add_objective(self) -> None:
        """Add an objective, predicted as 0."""
        self.queries.append(_zero_linear(self.factors.in_features, self.rank))

    def query(self, hidden_XH: torch.Tensor) -> torch.Tensor:
        """q_m(h(s)) of all objectives, [X, M, R]."""
        shared_XH = F.gelu(self.state(_normal(hidden_XH)))
        return torch.stack([query(shared_XH) for query in self.queries], -2)

    def factor(self, embedding_NH: torch.Tensor) -> torch.Tensor:
        """e(a) of tokens with these embeddings, [N, R]."""
        return self.factors(F.gelu(self.token(_normal(embedding_NH))))


def _zero_linear(width: int, rank: int) -> nn.Linear:
    linear = nn.Linear(width, rank)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _normal(x_XH: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_XH.float(), x_XH.shape[-1:])


class Student(nn.Module):
    """A value model and its QHead as one model, whose outputs are V_m(s) and q_m(s), concatenated."""

    def __init__(self, model: ValueModel, qhead: QHead, state_layer: int | None = None):
        """`state_layer`: where the model's backbone is the first layers of a base model, their number."""
        super().__init__()
        self.model, self.qhead, self.state_layer = model, qhead, state_layer
        self._factors_VR: torch.Tensor | None = None

    @property
    def num_objectives(self) -> int:
        return len(self.qhead.queries)

    @property
    def device(self) -> torch.device:
        return self.model.heads.weight.device

    def add_objective(self) -> None:
        """Add an objective, valued and predicted as 0; the others do not change."""
        self.model.add_objective()
        self.qhead.add_objective()

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Outputs [B, T, M + M * R] for the arguments of a Hugging Face decoder."""
        return self.read(self.model.backbone(**inputs).last_hidden_state)

    def read(self, hidden_XH: torch.Tensor) -> torch.Tensor:
        """Outputs [X, M + M * R] of hidden states."""
        hidden_XH = hidden_XH.float()
        return torch.cat([self.model.heads(hidden_XH), self.qhead.query(hidden_XH).flatten(-2)], -1)

    def split(self, out_XO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs -> V_m(s) [X, M] and q_m(s) [X, M, R]."""
        values_XM, queries_XMR = out_XO.split([self.num_objectives, self.num_objectives * self.qhead.rank], -1)
        return values_XM, queries_XMR.unflatten(-1, (self.num_objectives, self.qhead.rank))

    def token_factors(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """e(a) [N, R]; computed once for the whole vocabulary, so training must be finished."""
        if self._factors_VR is None or self._factors_VR.device != tokens_N.device:
            embeddings: Any = self.model.backbone.get_input_embeddings()
            self._factors_VR = self.qhead.factor(embeddings.weight)
        return self._factors_VR[tokens_N]


def predicted(queries_NMR: torch.Tensor, factors_NR: torch.Tensor) -> torch.Tensor:
    """delta_m(s, a) [N, M] of candidates, each with its state's queries; any dimensions may take the place of N."""
    # A sum of products, not a matrix product: a candidate's result does not depend on the number of candidates.
    return (queries_NMR * factors_NR.unsqueeze(-2)).sum(-1)


def deltas(qhead: QHead, state_CH: torch.Tensor, embedding_CH: torch.Tensor) -> torch.Tensor:
    """delta_m(s, a) [C, M] of candidates with these embeddings in states with these hidden states."""
    return predicted(qhead.query(state_CH), qhead.factor(embedding_CH))


def save(qhead: QHead, folder: Path) -> None:
    """Write the head into the folder of its value model. The caller makes the folder appear whole."""
    save_file({k: v.detach().contiguous().cpu() for k, v in qhead.state_dict().items()}, folder / QHEAD_FILE)


def load(folder: Path, model: ValueModel, state_layer: int | None = None) -> Student:
    """The student of a distilled value model that was loaded from the same folder, ready for use.

    Args:
        state_layer: of the model's card.

    Raises:
        ValueModelError: the file or a tensor is missing, damaged, or belongs to another model.
    """
    width, num_objectives = model.heads.in_features, model.heads.out_features
    try:
        weights = load_file(folder / QHEAD_FILE)
        qhead = QHead(width, num_objectives, weights["factors.weight"].shape[0])
        qhead.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueModelError(f"the student {folder / QHEAD_FILE} cannot be read ({reason}): distil it again") from None
    qhead = qhead.to(model.heads.weight.device)
    return Student(model, qhead, state_layer).eval().requires_grad_(False)
