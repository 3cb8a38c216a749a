"""The gate: whether a new iteration of a value model replaces the current one. No Ray.

The soft value of a policy is its reward less the price of its divergence: E[R - KL(pi || pi_ref) / beta], in standard
deviations of the reward. Regression errors can make an iteration worse than the previous one; the two are compared on
the same prompts and seeds, and a new iteration is refused if it may be worse by more than a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mavis_dist.decode import Choice, Request, SamplingParams, Scorer
from mavis_dist.evaluate import sweep
from mavis_dist.evaluate.sweep import Estimate, Point, bootstrap
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, RewardScale


@dataclass(frozen=True)
class Decision:
    """One iteration against the current one; the first iteration, or one without validation, is accepted."""

    objective: str
    iteration: int
    accepted: bool
    current: int | None  # the iteration that it was compared with
    soft_values: list[float]  # by validation prompt; of the first iteration, empty until a second is compared with it
    difference: float | None = None  # in soft value, sd; the new one less the current
    low: float | None = None  # 95 % bootstrap interval over prompts
    high: float | None = None
    prompts_needed: int | None = None  # about as many would tell a difference of the margin; None: these could

    def verdict(self) -> str:
        """The decision as text: accepted or refused, and the difference."""
        if self.difference is None:
            return "accepted, there is none to compare with"
        decided = "accepted" if self.accepted else f"refused, iteration {self.current} stays"
        interval = f"{self.difference:+.2f} [{self.low:+.2f}, {self.high:+.2f}] sd"
        needed = f"; too few prompts to tell: use about prompts.validation={self.prompts_needed}"
        return (
            f"{decided}: soft value {interval} against iteration {self.current}"
            f"{needed if self.prompts_needed and not self.accepted else ''}"
        )


def request_id(objective: str, prompt: Prompt) -> str:
    return sweep.request_id(_point(objective), prompt)


def requests(
    objective: str, prompts: Sequence[Prompt], beta: float, tilt_cap: float | None, params: SamplingParams
) -> list[tuple[Prompt, Request]]:
    """Every prompt under an objective's own tilted policy; a prompt has the same seed in every iteration."""
    # The divergence is part of the result, so it is not estimated.
    return sweep.requests(_point(objective), prompts, beta, tilt_cap, params, Scorer.FULL)


def _point(objective: str) -> Point:
    return Point(f"gate/{objective}", {objective: 1.0})


def soft_values(
    answers: Sequence[Sequence[tuple[Choice, str]]], scores: Sequence[float], scale: RewardScale, beta: float
) -> list[float]:
    """Mean of R - KL / beta over the answers to each prompt, in standard deviations; `scores` are raw, side by side."""
    price, score = 1.0 / beta if beta > 0 else 0.0, iter(scores)
    return [
        float(np.mean([scale.standardise(next(score)) - price * choice.divergence for choice, _ in row]))
        for row in answers
    ]


def decide(store: Store, objective: str, iteration: int, soft_values: list[float], margin: float) -> Decision:
    """Compare with the current iteration by a paired bootstrap over prompts, and store the decision."""
    before = current(store, objective, iteration)
    if before is None or not soft_values:
        decision = Decision(objective, iteration, True, before, soft_values)
    else:
        metadata = store.metadata(layout.gate_folder(objective, before)) or {}
        gain = bootstrap(np.array(soft_values) - np.array(metadata["soft_values"]))
        accepted, needed = gain.low > -margin, prompts_needed(gain, len(soft_values), margin)
        decision = Decision(objective, iteration, accepted, before, soft_values, gain.mean, gain.low, gain.high, needed)
    store.finish(layout.gate_folder(objective, iteration), asdict(decision))
    return decision


def prompts_needed(gain: Estimate, num_prompts: int, margin: float) -> int | None:
    """Prompts with which half the interval would be as wide as the margin; None: it is not wider, or 0 is in none."""
    width = (gain.high - gain.low) / 2
    is_told = width <= margin or gain.low > 0 or gain.high < -margin
    return (
        None if is_told or margin == 0 or not math.isfinite(width) else math.ceil(num_prompts * (width / margin) ** 2)
    )


def without_soft_values(store: Store, iterations: Mapping[str, int]) -> dict[str, int]:
    """Those of some accepted iterations, by objective, whose soft values were never needed."""
    known = {name: store.metadata(layout.gate_folder(name, i)) or {} for name, i in iterations.items()}
    return {name: i for name, i in iterations.items() if not known[name].get("soft_values")}


def add_soft_values(store: Store, objective: str, iteration: int, soft_values: list[float]) -> None:
    """Store the soft values of an iteration that is accepted already."""
    folder = layout.gate_folder(objective, iteration)
    store.finish(folder, {**(store.metadata(folder) or {}), "soft_values": soft_values})


def current(store: Store, objective: str, before: int) -> int | None:
    """The newest accepted iteration below `before`; None if there is none."""
    accepted = ((store.metadata(layout.gate_folder(objective, i)) or {}).get("accepted") for i in range(before))
    return max((i for i, is_accepted in enumerate(accepted) if is_accepted), default=None)
