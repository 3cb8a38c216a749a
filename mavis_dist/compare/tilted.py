"""MAVIS: the base model tilted by value models, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mavis_dist.compare.guides import ValueModels
from mavis_dist.compare.method import Answer
from mavis_dist.compare.sampling import best_of_divergence, chosen
from mavis_dist.decode import Scorer
from mavis_dist.models.value import load_card
from mavis_dist.sections import MAX_N
from mavis_dist.types import Prompt, UserError

STUDENTS = (Scorer.PREDICTED, Scorer.QHEAD)


class Mavis(ValueModels):
    """Value-guided decoding; the strength is beta.

    Settings, besides those of ValueModels: `scorer` (docs/decoding.md); `n`, of so many steered answers the one with
    the best weighted true reward is given. The divergence is that of every step, summed: exact with the scorer `full`,
    right within 3 % as a mean with `lazy`. That of a best of n is an estimate.
    """

    strengths = (1.0, 2.0, 4.0, 8.0)
    defaults = MappingProxyType({"run": None, "distilled": None, "scorer": Scorer.LAZY.value, "n": 1})

    @property
    def scorer(self) -> Scorer:
        return Scorer(self.settings["scorer"])

    @property
    def is_distilled(self) -> bool:
        given = self.settings["distilled"]
        return self.scorer in STUDENTS if given is None else bool(given)

    def check(self) -> None:
        scorer, n = self.settings["scorer"], self.settings["n"]
        known = [one.value for one in Scorer]
        if scorer not in known:
            raise UserError(f"scorer is {scorer!r}: use {', '.join(known)}")
        if not (isinstance(n, int) and 1 <= n <= MAX_N):
            raise UserError(f"n is {n!r}: use an integer from 1 to {MAX_N}")
        super().check()
        if self.scorer in STUDENTS and not all(load_card(folder).teachers for folder in self.folders().values()):
            raise UserError(f"scorer is {scorer!r}, which needs a distilled model: set distilled to true")

    def inputs(self) -> Mapping[str, Any]:
        return {**super().inputs(), **self.workspace.config.steer.model_dump(exclude={"beta"})}

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        n, steer = int(self.settings["n"]), self.workspace.config.steer
        requests = self.workspace.requests(
            prompts,
            seed,
            n,
            weights=dict(weights),
            beta=strength,
            tilt_cap=steer.tilt_cap,
            residual_cap=steer.residual_cap,
            scorer=self.scorer,
        )
        found = self.workspace.generate(requests, self.folders())
        if n == 1:
            return [
                Answer(one.text, len(one.tokens), one.divergence, len(one.tokens), 0, found.seconds_of([one]))
                for (one,) in found.choices
            ]
        best_P = self.workspace.weighted(prompts, found.choices, weights).argmax(axis=1)
        answers = []
        for row, best in zip(found.choices, best_P, strict=True):
            # Of the chosen answer: the expectation of this sum under the best of n is its divergence from the base.
            divergence = math.fsum(row[best].logratios) + best_of_divergence(n)
            answers.append(chosen(row, int(best), divergence, n * len(weights), found.seconds_of(row)))
        return answers
