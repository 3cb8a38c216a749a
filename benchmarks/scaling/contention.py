"""How fast processes of one computer compute beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from threading import Barrier
from typing import Any

LENGTH_S = 15.0
ROWS, TOKENS = 8, 64  # of a pass: as many products as reads of weights, as in decoding and in training

_barrier: Barrier


def passes_per_s(model: str, count: int, length_s: float = LENGTH_S) -> float:
    """Forward passes of a model, per second and process, of so many processes of one thread each."""
    return _per_s(partial(_passes, model), count, length_s)


def steps_per_s(model: str, layers: int, count: int, length_s: float = LENGTH_S) -> float:
    """Training steps of a model's first layers, per second and process, of so many processes of one thread each."""
    return _per_s(partial(_steps, model, layers), count, length_s)


def _per_s(make: Callable[[], Callable[[], None]], count: int, length_s: float) -> float:
    context = get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, _remember, (barrier,)) as pool:
        speeds = list(pool.map(_speed, [make] * count, [length_s] * count))
    return sum(speeds) / count


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _speed(make: Callable[[], Callable[[], None]], length_s: float) -> float:
    import torch

    torch.set_num_threads(1)
    work = make()
    work()
    _barrier.wait()
    num_done, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < length_s:
        work()
        num_done += 1
    return num_done / took


def _passes(model: str) -> Callable[[], None]:
    import torch

    from mavis_dist.models.load import load_base

    module, tokens = load_base(model).model, torch.ones(ROWS, TOKENS, dtype=torch.long)

    @torch.no_grad()
    def forward() -> None:
        module(tokens)

    return forward


def _steps(model: str, layers: int) -> Callable[[], None]:
    import torch
    from transformers import AutoModel

    from mavis_dist.models.directory import read_model
    from mavis_dist.models.fetch import fetch

    module, tokens = read_model(AutoModel, fetch(model)), torch.ones(ROWS, TOKENS, dtype=torch.long)
    module.layers = module.layers[:layers]
    module.requires_grad_(True).embed_tokens.requires_grad_(False)  # as of value models
    optimiser = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad])

    def step() -> None:
        module(tokens, use_cache=False).last_hidden_state.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step
