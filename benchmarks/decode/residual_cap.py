"""Cost and savings of the residual cap, on answers of the predicted scorer, against a distilled model's own values.

Shapes: T steps of an answer, K candidates.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common.workload import Workload
from benchmarks.decode.qhead_quality import predict, student_settings, uncapped
from benchmarks.decode.tilt_cap import MAX_TOKENS, Steps, divergence, replay
from mavis_dist.core.tilt import capped
from mavis_dist.decode import Engine, LocalGuide, Request, Scorer


def measure(workload: Workload, cap: float, residual_caps: Sequence[float], num_prompts: int) -> list[dict[str, Any]]:
    """One entry per cap and setting of the weights; empty without a student."""
    own = {name: (student.model, head) for name, (student, head) in workload.students.items()}
    engine = Engine(workload.base, LocalGuide(own, workload.students), max_rows=num_prompts)
    entries = []
    for name, weights in student_settings(workload).items():
        lazy = workload.requests(num_prompts, [weights], MAX_TOKENS, Scorer.LAZY, cap)
        candidates = {"lazy_candidates_per_token": _candidates(engine, lazy)}
        for residual_cap in residual_caps:
            requests = workload.requests(num_prompts, [weights], MAX_TOKENS, Scorer.PREDICTED, cap, residual_cap)
            found = _measure(workload, engine, cap, residual_cap, requests)
            entries.append({"weights": name, "cap": cap, "residual_cap": residual_cap} | candidates | found)
    return entries


def _candidates(engine: Engine, requests: Sequence[Request]) -> float:
    return statistics.fmean(n for [choice] in engine.generate(requests) for n in choice.num_scored)


def _measure(
    workload: Workload, engine: Engine, cap: float, residual_cap: float, requests: Sequence[Request]
) -> dict[str, float]:
    choices = [choice for [choice] in engine.generate(requests)]
    values = {name: student.model.only(head) for name, (student, head) in workload.students.items()}
    variation: list[float] = []
    exact_divergence = 0.0
    for request, choice in zip(requests, choices, strict=True):
        exact = replay(workload.base, values, request, choice.tokens)
        predicted = predict(workload.students, request, choice.tokens, exact)
        probs_TK = distribution(exact, uncapped(predicted), cap, residual_cap)
        variation += ((probs_TK - exact.distribution(cap)).abs().sum(-1) / 2).tolist()
        exact_divergence += divergence(probs_TK, exact.logprobs_TK)
    return {
        "candidates_per_token": statistics.fmean(n for choice in choices for n in choice.num_scored),
        "tv": statistics.fmean(variation),
        "divergence_ratio": sum(choice.divergence for choice in choices) / exact_divergence,
        "steps": len(variation),
    }


def distribution(exact: Steps, predicted_TK: torch.Tensor, cap: float, residual_cap: float) -> torch.Tensor:
    """The next-token distribution [T, K] at temperature 1 under both caps."""
    cap_TK = (predicted_TK + residual_cap).clamp(max=cap)
    return torch.softmax(exact.logprobs_TK + capped(uncapped(exact), cap_TK, exact.is_eos_TK), -1)
