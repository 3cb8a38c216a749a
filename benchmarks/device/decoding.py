"""Speed of this project's engine, unguided and guided, and of Hugging Face `generate`, with the same prompts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.device import machine
from benchmarks.device.machine import Machine
from benchmarks.device.models import (
    BETA,
    FIRST_TOKEN,
    PAD,
    ROWS_LOOKED_AT,
    TOP_K,
    Guided,
    Models,
    entropy,
    sample,
    top_logits,
)
from mavis_dist.decode import Choice, Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.types import TILT_CAP

PROMPT_TOKENS = (90, 110)  # shortest and longest
WARM_UP_TOKENS = 6
CELLS = 64  # where steps have fixed shapes, keys and values are read in such portions

Say = Callable[[str], None]


def measure(models: Models, rows: int, tokens: int, rates: Machine, say: Say) -> dict[str, Any]:
    """Figures of `rows` answers of `tokens` tokens each, by variant where variants differ."""
    prompts = make_prompts(rows, models.shape.vocabulary)
    figures: dict[str, Any] = {name: {} for name in ("tokens_per_s", "step_ms", "candidates", "nats", "peak_gib")}
    kinds: dict[str, Guided] = {"unguided": {}, "lazy_2": models.separate, "lazy_2_heads": models.shared}
    for kind, guided in kinds.items():
        for name, figure in measure_engine(models, guided, prompts, tokens).items():
            figures[name][kind] = figure
        say(f"{kind}: {figures['tokens_per_s'][kind]:.0f} tokens/s, {figures['step_ms'][kind]:.2f} ms a step")
    seconds, peak_gib = measure_hugging_face(models, prompts, tokens)
    figures["tokens_per_s"]["hf"], figures["peak_gib"]["hf"] = rows * tokens / seconds, peak_gib
    say(f"hf: {figures['tokens_per_s']['hf']:.0f} tokens/s")
    visible = statistics.fmean(map(len, prompts)) + tokens / 2
    figures["limit_ms"] = rates.limit_ms(models.shape, rows, visible)
    figures["entropy"] = figures["nats"].pop("unguided")
    say(f"least possible {figures['limit_ms']:.2f} ms a step, entropy {figures['entropy']:.2f} nats")
    return figures


def make_prompts(rows: int, vocabulary: int, lengths: tuple[int, int] = PROMPT_TOKENS) -> list[tuple[int, ...]]:
    source = random.Random(rows)
    return [
        tuple(source.randrange(FIRST_TOKEN, vocabulary) for _ in range(source.randint(*lengths))) for _ in range(rows)
    ]


def make_requests(prompts: Sequence[tuple[int, ...]], objectives: Sequence[str], tokens: int) -> list[Request]:
    """Of which each has its own weights and seed."""
    return [
        Request(
            str(i),
            prompt,
            weights={name: 1.0 + (i + m) % 4 for m, name in enumerate(objectives)},
            beta=BETA,
            tilt_cap=TILT_CAP,
            params=SamplingParams(tokens, top_k=TOP_K, seed=i),
            scorer=Scorer.LAZY,
        )
        for i, prompt in enumerate(prompts)
    ]


def measure_engine(models: Models, guided: Guided, prompts: Sequence[tuple[int, ...]], tokens: int) -> dict[str, float]:
    """Tokens per second with the prompts; ms of a step in which all rows generate, the median; GiB in tensors at most.
    Guided: candidates evaluated per row and token, and nats of divergence per token; else the entropy under `nats`.
    """
    device = models.base.model.device
    machine.free(device)
    # All prompts are encoded in the first step, so that all rows generate from the second one to the last.
    engine = Engine(
        models.base,
        LocalGuide(guided) if guided else None,
        max_rows=len(prompts),
        prefill_tokens=sum(map(len, prompts)),
    )
    warm_up(engine, prompts, [*guided], tokens, device)
    choices, seconds, step_s = generate(engine, make_requests(prompts, [*guided], tokens), device)
    figures = {
        "tokens_per_s": len(prompts) * tokens / seconds,
        "step_ms": 1000 * statistics.median(step_s),
        "peak_gib": machine.peak_gib(device),
    }
    if guided:
        figures["candidates"] = statistics.fmean(count for choice in choices for count in choice.num_scored)
        figures["nats"] = statistics.fmean(choice.divergence / tokens for choice in choices)
    else:
        figures["nats"] = entropy_of(models.base.model, prompts, choices)
    return figures


def warm_up(
    engine: Engine, prompts: Sequence[tuple[int, ...]], objectives: Sequence[str], tokens: int, device: torch.device
) -> None:
    """Run everything that is done, or recorded, once per shape: the prompts, and steps at all lengths of the answers.

    The longer prompts are the same in all rows, which takes one encoding.
    """
    generate(engine, make_requests(prompts, objectives, WARM_UP_TOKENS), device)
    longest = max(prompts, key=len)
    for length in range(len(longest) + CELLS, len(longest) + tokens + 1, CELLS):
        prompt = (longest * (1 + length // len(longest)))[:length]
        [request] = make_requests([prompt], objectives, WARM_UP_TOKENS)
        generate(engine, [replace(request, params=replace(request.params, n=len(prompts)))], device)


def generate(
    engine: Engine, requests: Sequence[Request], device: torch.device
) -> tuple[list[Choice], float, list[float]]:
    """All answers in the order of the requests, seconds, and seconds of every step but the first in which all rows
    generate.
    """
    num_rows = sum(request.params.n for request in requests)
    choices: list[tuple[int, Choice]] = []
    step_s: list[float] = []
    machine.wait(device)
    started = before = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        updates = engine.step()
        now = time.perf_counter()
        step_s += [now - before] if len(updates) == num_rows else []
        before = now
        choices += [(int(update.request_id), update.finished) for update in updates if update.finished]
    machine.wait(device)
    seconds = time.perf_counter() - started
    answers = [choice for _, choice in sorted(choices, key=lambda entry: (entry[0], entry[1].index))]
    short = next((choice for choice in answers if len(choice.tokens) < requests[0].params.max_tokens), None)
    assert short is None, f"an answer ended: {short}"
    return answers, seconds, step_s[1:]


def entropy_of(model: Any, prompts: Sequence[tuple[int, ...]], choices: Sequence[Choice]) -> float:
    """Of the candidates at the tokens of some answers, nats; the mean."""
    logits = []
    for prompt, choice in zip(prompts[:ROWS_LOOKED_AT], choices, strict=False):
        tokens_1T = torch.tensor([[*prompt, *choice.tokens]], device=model.device)
        logits.append(top_logits(model, tokens_1T, len(choice.tokens)))
    return entropy(torch.cat(logits))


def measure_hugging_face(models: Models, prompts: Sequence[tuple[int, ...]], tokens: int) -> tuple[float, float]:
    """Seconds of all answers with the prompts, padded to the longest, and GiB in tensors at most."""
    model: Any = models.base.model
    machine.free(model.device)
    padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    pairs = list(zip(padding, prompts, strict=True))
    ids = torch.tensor([[PAD] * n + [*prompt] for n, prompt in pairs], device=model.device)
    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in pairs], device=model.device)
    seconds = 0.0
    for count in (WARM_UP_TOKENS, tokens):
        torch.manual_seed(0)
        machine.wait(model.device)
        started = time.perf_counter()
        sample(model, ids, mask, count)
        machine.wait(model.device)
        seconds = time.perf_counter() - started
    return seconds, machine.peak_gib(model.device)
