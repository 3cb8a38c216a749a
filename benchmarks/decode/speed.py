"""Tokens per second of every decoding variant, measured in alternation. Times include the prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.common.workload import Workload, weight_settings
from benchmarks.decode import naive
from mavis_dist.decode import Engine, LocalGuide, Scorer
from mavis_dist.types import TILT_CAP

NUM_OBJECTIVES = (1, 2, 4)
WARMUP_TOKENS = 3

Decode = Callable[[int, int, int], int]  # (concurrent requests, tokens per answer, repetition) -> tokens generated
Speeds = dict[str, dict[int, list[float]]]  # variant -> concurrent requests -> tokens/s of every repetition


def measure(workload: Workload, sizes: Sequence[int], repetitions: int, tokens: int) -> Speeds:
    """The reference is measured with 1 request only: it answers one after the other, whatever their number."""
    variants = make_variants(workload, max(sizes))
    turns = [(name, size) for size in sizes for name in variants if name != "reference" or size == 1]
    speeds: Speeds = {name: {} for name in variants}
    for name, size in turns:
        variants[name](size, WARMUP_TOKENS, 0)
    for repetition in range(repetitions):
        for name, size in turns if repetition % 2 == 0 else turns[::-1]:
            started = time.perf_counter()
            num_tokens = variants[name](size, tokens, repetition)
            speeds[name].setdefault(size, []).append(num_tokens / (time.perf_counter() - started))
    return speeds


def median(speeds: Speeds, name: str, size: int) -> float:
    return statistics.median(speeds[name][size])


def ratio(speeds: Speeds, name: str, other: str, size: int, other_size: int | None = None) -> float:
    """Speed of one variant over that of the other: the median of the ratios within a repetition."""
    pairs = zip(speeds[name][size], speeds[other][other_size or size], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def make_variants(workload: Workload, max_rows: int) -> dict[str, Decode]:
    """All engine variants share one engine: a value model without weight in a request costs nothing."""
    model = next(iter(workload.models.values()))
    heads = {"first head": (model, 0), "second head": (model, 0)}
    guide = LocalGuide({**workload.models, **heads}, workload.students)
    engine = Engine(workload.endless, guide, max_rows=max_rows)
    variants = {"hf": _hugging_face(workload), "unguided": _engine(workload, engine, (), Scorer.FULL)}
    for scorer in (Scorer.FULL, Scorer.LAZY):
        for count in NUM_OBJECTIVES:
            variants[f"{scorer.value}_{count}"] = _engine(workload, engine, [*workload.models][:count], scorer)
        variants[f"{scorer.value}_2_heads"] = _engine(workload, engine, [*heads], scorer)
    if workload.students:
        name = f"{Scorer.QHEAD.value}_{len(workload.students)}"
        variants[name] = _engine(workload, engine, [*workload.students], Scorer.QHEAD)
    return {**variants, "reference": _reference(workload)}


def _engine(workload: Workload, engine: Engine, objectives: Sequence[str], scorer: Scorer) -> Decode:
    cap = None if scorer is Scorer.FULL else TILT_CAP

    def decode(size: int, tokens: int, repetition: int) -> int:
        requests = workload.requests(size, weight_settings(objectives), tokens, scorer, cap)
        return sum(len(choice.tokens) for choices in engine.generate(requests) for choice in choices)

    return decode


def _hugging_face(workload: Workload) -> Decode:
    model, pad = workload.base.model, workload.base.eos_ids[0]

    def decode(size: int, tokens: int, repetition: int) -> int:
        prompts = workload.prompts[:size]
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        ids = torch.tensor([[pad] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        torch.manual_seed(repetition)
        answers = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=40,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=pad,
        )
        return answers[:, ids.shape[1] :].numel()

    return decode


def _reference(workload: Workload) -> Decode:
    def decode(size: int, tokens: int, repetition: int) -> int:
        requests = workload.requests(len(workload.prompts), weight_settings([*workload.models][:2]), tokens)
        return len(naive.answer(workload.endless, workload.models, requests[repetition % len(requests)]))

    return decode
