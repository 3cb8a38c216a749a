"""An MDP small enough to be solved exactly: every answer over a few tokens, with its base policy and rewards.

Shapes: S unfinished answers, N answers finished or not (the unfinished ones first), K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, tilt
from mavis_dist.core.tree import Tree
from mavis_dist.decode import Choice, FinishReason, Request, Update
from tests.exact import log_ratio

EOS = 0
Prefix = tuple[int, ...]


class ToyMDP:
    """Answers of up to `horizon` tokens, the first never EOS; a random policy truncated to `top_k`; random rewards.

    Answers that end with EOS get `stop_bonus` in addition: a policy's finished answers are a biased sample.
    """

    def __init__(self, seed: int, vocab: int = 4, horizon: int = 4, top_k: int = 3, stop_bonus: float = 0.0):
        rng = np.random.default_rng(seed)
        self.horizon = horizon
        unfinished: list[Prefix] = []
        finished: list[Prefix] = []
        self.levels: list[slice] = []
        ids, logprobs = [], []
        level: list[Prefix] = [()]
        for depth in range(horizon):
            logits = torch.from_numpy(rng.normal(size=(len(level), vocab)))
            if depth == 0:
                logits[:, EOS] = float("-inf")
            ids_LK, logprobs_LK = truncate(logits, top_k)
            ids.append(ids_LK)
            logprobs.append(logprobs_LK)
            self.levels.append(slice(len(unfinished), len(unfinished) + len(level)))
            unfinished += level
            children = [(*prefix, int(token)) for prefix, row in zip(level, ids_LK, strict=True) for token in row]
            is_end = [child[-1] == EOS or len(child) == horizon for child in children]
            finished += [child for child, end in zip(children, is_end, strict=True) if end]
            level = [child for child, end in zip(children, is_end, strict=True) if not end]
        self.prefixes = unfinished + finished
        self.number = {prefix: n for n, prefix in enumerate(self.prefixes)}
        self.num_unfinished = len(unfinished)
        self.ids_SK, self.base_SK = torch.cat(ids), torch.cat(logprobs)
        self.child_SK = torch.tensor(
            [[self.number[(*p, int(a))] for a in row] for p, row in zip(unfinished, self.ids_SK, strict=True)]
        )
        self.reward_F = torch.tensor(
            [rng.normal() + stop_bonus * (prefix[-1] == EOS) for prefix in finished], dtype=torch.float64
        )

    def state(self, answer: Iterable[int]) -> int:
        """The number of an answer's state."""
        return self.number[tuple(int(token) for token in answer)]

    def states_of_tokens(self, tree: Tree) -> np.ndarray:
        """The state that each packed token of a tree leads to, int64; the prompt's one token leads to the root."""
        states = [self.state(())]
        for node in range(tree.num_nodes):
            answer, length = tree.answer(node), tree.length(node)
            states += [self.state(answer[: len(answer) - left]) for left in reversed(range(length))]
        return np.array(states)

    def values(self, ratio_SK: torch.Tensor, zeta: float) -> torch.Tensor:
        """V [N] of the policy with these log-ratios to the base: E[reward - zeta * log-ratios to come]."""
        value_N = self._rewards()
        for level in reversed(self.levels):
            probs_LK = (self.base_SK[level] + ratio_SK[level]).exp()
            value_N[level] = (probs_LK * (value_N[self.child_SK[level]] - zeta * ratio_SK[level])).sum(-1)
        return value_N

    def optimal_values(self, zeta: float) -> torch.Tensor:
        """V* [N] = zeta log sum p exp(V* / zeta), the maximum over all policies."""
        value_N = self._rewards()
        for level in reversed(self.levels):
            gain_LK = value_N[self.child_SK[level]] / zeta
            value_N[level] = zeta * torch.logsumexp(self.base_SK[level] + gain_LK, -1)
        return value_N

    def delta(self, value_N: torch.Tensor, beta: float) -> torch.Tensor:
        """The tilt [S, K] by these values, computed by the project."""
        num_states = self.num_unfinished
        return tilt(
            value_N[self.child_SK][..., None],
            value_N[:num_states, None],
            torch.ones(num_states, 1),
            torch.full((num_states,), beta, dtype=torch.float64),
            torch.full((num_states,), float("inf")),
            torch.zeros_like(self.ids_SK, dtype=torch.bool),
        )

    def ratio(self, delta_SK: torch.Tensor) -> torch.Tensor:
        """The log-ratios [S, K] to the base policy at temperature 1."""
        return log_ratio(self.base_SK, delta_SK, torch.ones(self.num_unfinished))

    def answer_logprobs(self, ratio_SK: torch.Tensor) -> torch.Tensor:
        """Log-probability [F] of every finished answer under the policy with these log-ratios."""
        logprob_N = torch.zeros(len(self.prefixes), dtype=torch.float64)
        for level in self.levels:
            logprob_N[self.child_SK[level]] = logprob_N[level, None] + self.base_SK[level] + ratio_SK[level]
        return logprob_N[self.num_unfinished :]

    def _rewards(self) -> torch.Tensor:
        return torch.cat([torch.zeros(self.num_unfinished, dtype=torch.float64), self.reward_F])


def truncate(logits_BV: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates at temperature 1 with the same top_k in every row and no other filter."""
    num_rows = len(logits_BV)
    one_B, zero_B = torch.ones(num_rows), torch.zeros(num_rows)
    return candidates(logits_BV, torch.full((num_rows,), top_k), one_B, zero_B, one_B)


@dataclass
class _Row:
    request: Request
    choice: Choice
    answer: Prefix


class ToyEngine:
    """Generates a toy's answers behind an engine's submit() and step(); guided requests follow the tilt."""

    def __init__(self, mdp: ToyMDP, delta_SK: torch.Tensor):
        self._mdp, self._delta_SK, self._ratio_SK = mdp, delta_SK, mdp.ratio(delta_SK)
        self._rows: list[_Row] = []

    @property
    def is_idle(self) -> bool:
        return not self._rows

    def submit(self, request: Request, first: bool = False) -> Request:
        self._rows.append(_Row(request, Choice(0), request.answer))
        return request

    def step(self) -> list[Update]:
        rows, mdp = self._rows, self._mdp
        state_B = torch.tensor([mdp.number[row.answer] for row in rows])
        is_guided_B1 = torch.tensor([row.request.is_guided for row in rows])[:, None]
        noise_BK = noise.gumbel(
            torch.tensor([row.request.stream for row in rows]),
            torch.tensor([len(row.answer) for row in rows]),
            mdp.ids_SK[state_B],
        )
        delta_BK = torch.where(is_guided_B1, self._delta_SK[state_B], 0.0)
        chosen_B = choose(mdp.base_SK[state_B] + noise_BK, delta_BK, mdp.ids_SK[state_B])
        ratio_B = torch.where(is_guided_B1[:, 0], self._ratio_SK[state_B, chosen_B], 0.0)
        tokens = mdp.ids_SK[state_B, chosen_B].tolist()
        updates = [_append(row, *new) for row, *new in zip(rows, tokens, ratio_B.tolist(), strict=True)]
        self._rows = [row for row in rows if row.choice.finish is None]
        return updates


def _append(row: _Row, token: int, ratio: float) -> Update:
    start = len(row.answer)
    row.answer = (*row.answer, token)
    row.choice.tokens.append(token)
    row.choice.logratios.append(ratio)
    if token == EOS:
        row.choice.finish = FinishReason.STOP
    elif len(row.answer) == row.request.params.max_tokens:
        row.choice.finish = FinishReason.LENGTH
    return Update(row.request.id, 0, start, (token,), row.choice if row.choice.finish else None)
