"""How fast processes of one computer compute beside each other."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from threading import Barrier
from typing import Any

LENGTH_S = 15.0
ROWS, TOKENS = 8, 64  # of a pass: as many products as reads of weights, as in decoding and in training

_barrier: Barrier


def passes_per_s(model: str, count: int, length_s: float = LENGTH_S) -> float:
    """Forward passes of a model, per second and process, of so many processes of one thread each."""
    context = get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, _remember, (barrier,)) as pool:
        speeds = list(pool.map(_speed, [model] * count, [length_s] * count))
    return sum(speeds) / count


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _speed(model: str, length_s: float) -> float:
    import torch

    from mavis_dist.models.load import load_base

    torch.set_num_threads(1)
    module = load_base(model).model
    tokens = torch.ones(ROWS, TOKENS, dtype=torch.long)
    with torch.no_grad():
        module(tokens)
        _barrier.wait()
        num_passes, began = 0, time.monotonic()
        while (took := time.monotonic() - began) < length_s:
            module(tokens)
            num_passes += 1
    return num_passes / took
