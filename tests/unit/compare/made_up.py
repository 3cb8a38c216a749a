"""A made-up comparison whose figures are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mavis_dist.compare.cells import Answers, Cell, Weights, weight_vectors
from mavis_dist.compare.measured import Measured
from mavis_dist.types import RewardScale

NUM_PROMPTS = 40
SCALES = {"a": RewardScale(10.0, 2.0), "b": RewardScale(0.0, 1.0)}
BASE_PN = {name: np.random.default_rng(i).normal(0, 1, (NUM_PROMPTS, 64)) for i, name in enumerate(SCALES)}
VECTORS = weight_vectors(list(SCALES), 3)


def answers(gain: dict[str, float], divergence: float, seed: int, text: str = "one two one two") -> Answers:
    """Gains above the base model's mean with noise that cancels over two seeds."""
    noise = np.random.default_rng(9).normal(0, 1, NUM_PROMPTS) * (1 if seed else -1)
    whole = np.ones(NUM_PROMPTS)
    reward = {
        name: scale.mean + scale.sd * (BASE_PN[name].mean(1) + gain[name] + noise) for name, scale in SCALES.items()
    }
    return Answers(
        [text] * NUM_PROMPTS, 10 * whole, divergence * whole, 20 * whole, 3 * whole, 2 * whole, whole, whole, reward
    )


def cells_of(
    method: str, vectors: list[Weights], gain: Callable[[float], float], kl: Callable[[float], float]
) -> dict[Cell, Answers]:
    """At strength s, every objective gains `gain(s)` times its weight, at `kl(s)` nats."""
    return {
        Cell(method, weights, strength, seed, f"{method}/{weights}/{strength}/{seed}"): answers(
            {name: gain(strength) * dict(weights).get(name, 0.0) for name in SCALES}, kl(strength), seed
        )
        for weights in vectors
        for strength in (1.0, 2.0, 4.0)
        for seed in (0, 1)
    }


def made_up() -> Measured:
    """Methods that gain half of their strength or a quarter, at as many nats as their strength or a quarter of it."""
    base = {
        Cell("base", (), 0.0, seed, f"base{seed}"): answers({"a": 0, "b": 0}, 0, seed, "one two") for seed in (0, 1)
    }
    cells = {
        **base,
        **cells_of("mavis", VECTORS, lambda s: s / 2, lambda s: s),  # a gain of 1 at 2 nats
        **cells_of("weak", VECTORS, lambda s: s / 4, lambda s: s),
        **cells_of("short", VECTORS, lambda s: s / 4, lambda s: s / 4),  # a gain of 1 at 1 nat, and no more
        **cells_of("unknown", VECTORS, lambda s: s, lambda _: float("nan")),
    }
    return Measured(cells, BASE_PN, SCALES, kl=2.0)
