"""Bootstrap over prompts. Numpy only."""

from __future__ import annotations

import numpy as np


def resamples(count: int, num: int) -> np.ndarray:
    """How often each of `count` members is in each of `num` resamples, int64 [num, count]; the same in every call, so
    that everything computed for the same members is paired.
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), num)
