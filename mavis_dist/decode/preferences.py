"""What a request may say about objectives in words: the sentences, and how they steer. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mavis_dist.core.preferences import Accumulation, amplification


@dataclass(frozen=True)
class Preference:
    """One objective in words."""

    text: str
    prompt: tuple[int, ...]  # the request's prompt with the sentence in it
    weight: float = 1.0


@dataclass(frozen=True)
class PreferenceParams:
    """How sentences steer; the defaults are those of MATO (arXiv 2605.25342), whose symbols the names are.

    The published method has no `clip` and no `top_p`.
    """

    adapt: bool = True  # weights follow what the answer has earned so far; false: they stay as given
    tau: float = 1.0  # pull towards the given weights
    accumulation: Accumulation = Accumulation.MEAN
    decay: float = 0.9  # with Accumulation.DECAY
    clip: float = 10.0  # largest |S_k|, nats; inf: as published
    c: float | None = None  # strength; none: that of `steps` steps of online optimisation with alpha, lam and nu
    alpha: float = 0.5
    lam: float = 1.0
    nu: float = 10.0
    steps: int = 80
    top_p: float = 0.95  # no bonus for tokens outside both top-p sets, with sentences and without; 1: for all
    normalise: bool = True  # weights are shares that sum to 1; false: strengths of their own, which may be negative

    def __post_init__(self) -> None:
        object.__setattr__(self, "accumulation", Accumulation(self.accumulation))  # its value will do

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
        # arXiv 2405.01768, several contexts: log p + sum_k lambda_k g_k. For one of them the paper counts from
        # log p + g on: its lambda is the strength here less 1.
        "context_steering": PreferenceParams(adapt=False, c=1.0, normalise=False),
        # arXiv 2502.19148, for one sentence.
        "amulet": PreferenceParams(adapt=False, alpha=2.0, lam=2.0, nu=10.0, steps=60),
    }
)
