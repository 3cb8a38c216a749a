"""What steering by sentences costs beside its rows: requests with sentences against as many plain requests.

Both read the very same prompts into as many rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from benchmarks.common.sentences import SENTENCES
from benchmarks.common.workload import Workload
from mavis_dist.decode import Engine, Request, SamplingParams, chat_prompts
from mavis_dist.prompts import load_prompts

FOUR_SENTENCES = (*SENTENCES.values(), "Write for a child of ten.")
NUM_REQUESTS = 8


def measure(workload: Workload, repetitions: int, num_steps: int) -> dict[str, list[float]]:
    """ms of every step in which all rows are written: with sentences, and of plain requests; in turns."""
    worded = requests(workload, num_steps + 1)
    prompts = [prompt for request in worded for prompt in (request.prompt, *(p.prompt for p in request.preferences))]
    plain = [
        Request(str(row), prompt, params=SamplingParams(num_steps + 1, seed=row)) for row, prompt in enumerate(prompts)
    ]
    engine = Engine(workload.endless, max_rows=len(prompts), prefill_tokens=sum(map(len, prompts)))
    step_ms: dict[str, list[float]] = {"worded": [], "plain": []}
    ways = [("worded", worded), ("plain", plain)]
    for _ in range(1 + repetitions):
        for name, asked in ways:
            step_ms[name] += _steps(engine, asked, num_steps)
        ways.reverse()
    first = num_steps  # the first repetition warms up
    return {name: times[first:] for name, times in step_ms.items()}


def rows_ratio(step_ms: dict[str, list[float]]) -> float:
    """Throughput of rows with sentences over that of plain ones."""
    return median(step_ms["plain"]) / median(step_ms["worded"])


def _steps(engine: Engine, asked: Sequence[Request], num_steps: int) -> list[float]:
    for request in asked:
        engine.submit(request)
    engine.step()  # reads all prompts
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - started))
    assert engine.is_idle
    return times


def requests(workload: Workload, tokens: int) -> list[Request]:
    """Every request with weights of its own."""
    _, questions = load_prompts(workload.config.prompts, workload.config.seed)
    asked = []
    for i, question in enumerate(questions[:NUM_REQUESTS]):
        sentences = [(text, 1.0 + (i + k) % 4) for k, text in enumerate(FOUR_SENTENCES)]
        system = workload.config.base.system
        prompt, preferences = chat_prompts(workload.base.tokenizer, question.text, sentences, system)
        asked.append(Request(str(i), prompt, params=SamplingParams(tokens, seed=i), preferences=preferences))
    return asked
