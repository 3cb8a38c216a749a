"""The preferences of a request, and how they steer. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mavis_dist.core.preferences import Accumulation, amplification


@dataclass(frozen=True)
class Preference:
    """One objective, given as a sentence."""

    text: str
    prompt: tuple[int, ...]  # the request's prompt with the preference in it
    weight: float = 1.0


@dataclass(frozen=True)
class PreferenceParams:
    """How preferences steer; names and defaults are those of MATO (arXiv 2605.25342).

    The published method has no `clip` and no `top_p`.
    """

    adapt: bool = True  # adapt weights to the answer's rewards so far; false: keep the given ones
    tau: float = 1.0  # pull towards the given weights
    accumulation: Accumulation = Accumulation.MEAN
    decay: float = 0.9  # with Accumulation.DECAY
    clip: float = 10.0  # largest |S_k|, nats; inf: as published
    c: float | None = None  # strength; None: that of `steps` steps of online optimisation with alpha, lam and nu
    alpha: float = 0.5
    lam: float = 1.0
    nu: float = 10.0
    steps: int = 80
    top_p: float = 0.95  # no bonus for tokens outside the top-p sets with and without preferences; 1: for all
    normalise: bool = True  # scale weights to sum to 1; false: they are strengths and may be negative

    def __post_init__(self) -> None:
        object.__setattr__(self, "accumulation", Accumulation(self.accumulation))  # accepts the value

    @property
    def strength(self) -> float:
        """c."""
        return amplification(self.alpha, self.lam, self.nu, self.steps) if self.c is None else self.c


PRESETS: Mapping[str, PreferenceParams] = MappingProxyType(
    {
        "mato": PreferenceParams(),
        # Neither adaptive weights nor online optimisation.
        "anchor": PreferenceParams(adapt=False, c=1.0),
        # arXiv 2401.11458: c = 1 + r; r = 2 as in the comparison of arXiv 2502.19148.
        "linear_alignment": PreferenceParams(adapt=False, c=3.0),
        # arXiv 2502.14204: c = 1 + 1 / beta, beta = 1.
        "opad": PreferenceParams(adapt=False, c=2.0),
        # arXiv 2405.01768, several contexts: log p + sum_k lambda_k g_k. For a single context the paper starts from
        # log p + g: its lambda is the strength here minus 1.
        "context_steering": PreferenceParams(adapt=False, c=1.0, normalise=False),
        # arXiv 2502.19148, for one preference.
        "amulet": PreferenceParams(adapt=False, alpha=2.0, lam=2.0, nu=10.0, steps=60),
    }
)
