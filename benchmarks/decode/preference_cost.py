"""The cost of steering by preferences beyond their rows in the batch: requests with preferences against plain ones.

Both have the same prompts in the same number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from benchmarks.common.workload import Workload
from mavis_dist.compare.preferences import PREFERENCES
from mavis_dist.decode import Engine, Request, SamplingParams, chat_prompts
from mavis_dist.prompts import load_prompts

TEXTS = (*PREFERENCES.values(), "Write for a child of ten.")
NUM_REQUESTS = 8


def measure(workload: Workload, repetitions: int, num_steps: int) -> dict[str, list[float]]:
    """ms of every decode step with all rows active, with preferences and of plain requests, measured in alternation."""
    steered = requests(workload, num_steps + 1)
    prompts = [prompt for r in steered for prompt in (r.prompt, *(p.prompt for p in r.preferences))]
    plain = [
        Request(str(row), prompt, params=SamplingParams(num_steps + 1, seed=row)) for row, prompt in enumerate(prompts)
    ]
    engine = Engine(workload.endless, max_rows=len(prompts), prefill_tokens=sum(map(len, prompts)))
    step_ms: dict[str, list[float]] = {"preferences": [], "plain": []}
    variants = [("preferences", steered), ("plain", plain)]
    for _ in range(1 + repetitions):
        for name, batch in variants:
            step_ms[name] += _steps(engine, batch, num_steps)
        variants.reverse()
    return {name: times[num_steps:] for name, times in step_ms.items()}  # without the warm-up


def rows_ratio(step_ms: dict[str, list[float]]) -> float:
    """Throughput of rows with preferences over that of plain ones."""
    return median(step_ms["plain"]) / median(step_ms["preferences"])


def _steps(engine: Engine, batch: Sequence[Request], num_steps: int) -> list[float]:
    for request in batch:
        engine.submit(request)
    engine.step()  # prefills all prompts
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - started))
    assert engine.is_idle
    return times


def requests(workload: Workload, tokens: int) -> list[Request]:
    """Requests with four preferences each, weighted differently."""
    _, questions = load_prompts(workload.config.prompts, workload.config.seed)
    found = []
    for i, question in enumerate(questions[:NUM_REQUESTS]):
        weighted = [(text, 1.0 + (i + k) % 4) for k, text in enumerate(TEXTS)]
        system = workload.config.base.system
        prompt, preferences = chat_prompts(workload.base.tokenizer, question.messages, weighted, system)
        found.append(Request(str(i), prompt, params=SamplingParams(tokens, seed=i), preferences=preferences))
    return found
