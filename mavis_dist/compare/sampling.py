"""Methods that choose among whole answers of the base model.

Divergences are those of the policies that the choice makes, estimates: best of n is log n - (n - 1) / n from the base
model (Beirami et al., arXiv 2401.01879: exact without ties, else an upper bound), whatever score it ranks by.

Shapes: P prompts, N answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import special

from mavis_dist.compare.guides import ValueModels
from mavis_dist.compare.method import Answer, Method
from mavis_dist.compare.workspace import Generated, Workspace
from mavis_dist.core import noise
from mavis_dist.decode import Choice, Request
from mavis_dist.decode.request import stream_of
from mavis_dist.sections import MAX_N
from mavis_dist.types import Prompt, UserError

UNTILTED = 1e-9  # beta: values are computed, and no answer changes


def best_of_divergence(n: int) -> float:
    """KL of the best of `n` answers from the policy that generated them, nats."""
    return math.log(n) - (n - 1) / n


def check_count(n: float, key: str) -> None:
    """Raises UserError unless `n` answers can be chosen among."""
    if not (n == int(n) and 2 <= n <= MAX_N):
        raise UserError(f"{key} has {n:g}: use integers from 2 to {MAX_N}")


class Base(Method):
    """The base model as it is."""

    is_steered = False

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        drawn = self.workspace.generate(self.workspace.requests(prompts, seed), {})
        return [
            Answer(choice.text, len(choice.tokens), 0.0, len(choice.tokens), seconds=drawn.seconds_of([choice]))
            for (choice,) in drawn.choices
        ]


class BestOfN(Method):
    """The best of n answers by their weighted true reward; the strength is n."""

    strengths = (2.0, 4.0, 8.0, 16.0)

    def check(self) -> None:
        for n in self.strengths:
            check_count(n, "strengths")

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        n = int(strength)
        drawn = self.workspace.draw(prompts, int(self.strengths[-1]), seed)
        rows = [row[:n] for row in drawn.choices]
        best_P = self.workspace.weighted(prompts, rows, weights).argmax(axis=1)
        return [
            chosen(row, int(best), best_of_divergence(n), n * len(weights), drawn.seconds_of(row))
            for row, best in zip(rows, best_P, strict=True)
        ]


class BestOfNByValue(ValueModels):
    """The best of n answers by their weighted value after the last token: no reward is called."""

    strengths = (2.0, 4.0, 8.0, 16.0)

    def __init__(self, workspace: Workspace, settings: Mapping[str, Any]):
        super().__init__(workspace, settings)
        self._known: dict[tuple[tuple[str, ...], int], Generated] = {}  # by prompts, seed

    def check(self) -> None:
        super().check()
        for n in self.strengths:
            check_count(n, "strengths")

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        n, most = int(strength), int(self.strengths[-1])
        drawn = self.workspace.draw(prompts, most, seed)
        found = self._values(prompts, [row[:most] for row in drawn.choices], seed)
        rows = [row[:n] for row in drawn.choices]
        answers = []
        for row, valued in zip(rows, (row[:n] for row in found.choices), strict=True):
            totals = [math.fsum(w * choice.values[name][-1] for name, w in weights.items()) for choice in valued]
            seconds = drawn.seconds_of(row) + found.seconds_of(valued)
            answers.append(chosen(row, int(np.argmax(totals)), best_of_divergence(n), 0, seconds))
        return answers

    def _values(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[Choice]], seed: int) -> Generated:
        """The values of finished answers: each is continued by its last token, from the same noise."""
        key = tuple(prompt.id for prompt in prompts), seed
        if key not in self._known:
            requests = self.workspace.requests(prompts, seed, weights=self.equal_weights(), beta=UNTILTED)
            asked = [_last_token(one, choice) for one, row in zip(requests, rows, strict=True) for choice in row]
            found = self.workspace.generate(asked, self.folders())
            flat = iter(choice for (choice,) in found.choices)
            self._known[key] = Generated([[next(flat) for _ in row] for row in rows], found.seconds)
        return self._known[key]


class ImportanceResampling(Method):
    """One of n answers, drawn with weights exp(beta * weighted true reward); the strength is beta.

    The divergence is that of the weights from equal ones, at least that of the policy.
    """

    strengths = (0.5, 1.0, 2.0, 4.0, 8.0)
    defaults = MappingProxyType({"n": 16})

    def check(self) -> None:
        check_count(self.settings["n"], "n")

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        n = int(self.settings["n"])
        drawn = self.workspace.draw(prompts, n, seed)
        rows = [row[:n] for row in drawn.choices]
        rewards_PN = self.workspace.weighted(prompts, rows, weights)
        log_shares_PN = special.log_softmax(strength * rewards_PN, axis=1)
        answers = []
        for prompt, row, log_shares_N in zip(prompts, rows, log_shares_PN, strict=True):
            shares_N = np.exp(log_shares_N)
            at = noise.uniform(noise.stream(seed, prompt.id, "resample"), 0)
            pick = min(int(np.searchsorted(np.cumsum(shares_N), at)), n - 1)
            divergence = max(0.0, math.log(n) + float(shares_N @ log_shares_N))
            answers.append(chosen(row, pick, divergence, n * len(weights), drawn.seconds_of(row)))
        return answers


def _last_token(request: Request, choice: Choice) -> Request:
    """The request that generates the last token of an answer again."""
    return replace(
        request,
        id=f"{request.id}/{choice.index}",
        answer=tuple(choice.tokens[:-1]),
        stream=stream_of(request, choice.index),
        params=replace(request.params, max_tokens=len(choice.tokens)),
    )


def chosen(row: Sequence[Choice], pick: int, divergence: float, reward_calls: int, seconds: float) -> Answer:
    """One of several answers, which all count."""
    generated = sum(len(choice.tokens) for choice in row)
    return Answer(row[pick].text, len(row[pick].tokens), divergence, generated, reward_calls, seconds)
