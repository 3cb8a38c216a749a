"""One process of `benchmarks.threads`: loads, waits for a line, works for some seconds, prints steps per second."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

MODEL = "smollm2-135m-instruct"
ROWS, PROMPT = 16, 64
TRAINED_LAYERS, TRAINED_TOKENS = 4, 1024
WARM_UP, DURATION_S = 3, 3.0


def main(work: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    step = trainer() if work == "training" else decoder(is_native=work == "native decoder")
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < DURATION_S:
        step()
        count += 1
    print(json.dumps(count / (time.perf_counter() - started)))


def decoder(is_native: bool) -> Callable[[], Any]:
    """A step of 16 rows, whose length stays the same."""
    from mavis_dist.models.decoder import base_decoder
    from mavis_dist.models.fused import FusedDecoder, linear_head
    from mavis_dist.models.kv import SlotModel
    from mavis_dist.models.load import load_base

    model: Any = load_base(MODEL, "bfloat16").model
    slots = SlotModel(base_decoder(model) if is_native else FusedDecoder(model.base_model, linear_head(model.lm_head)))
    rows = list(range(ROWS))
    for row in rows:
        slots.open(row)
    slots.extend(rows, [[100] * PROMPT] * ROWS)
    candidates_N = torch.full((ROWS,), 100)

    def step() -> None:
        slots.branch(rows, [1] * ROWS, candidates_N)
        slots.keep(rows, torch.zeros(ROWS, dtype=torch.long))
        if slots.length(0) >= 2 * PROMPT:
            for row in rows:
                slots.close(row)
            for row in rows:
                slots.open(row)
            slots.extend(rows, [[100] * PROMPT] * ROWS)

    return step


def trainer() -> Callable[[], Any]:
    """A step of a value model of four layers on as many tokens as a small packed batch has."""
    from mavis_dist.models.fetch import fetch
    from mavis_dist.models.value import from_base

    model = from_base(fetch(MODEL), TRAINED_LAYERS).to_precision(torch.bfloat16)
    optimiser = torch.optim.AdamW(model.parameters())
    ids = torch.arange(TRAINED_TOKENS).remainder(1000)[None]

    def step() -> None:
        loss = model(input_ids=ids, use_cache=False).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


if __name__ == "__main__":
    main(sys.argv[1])
