"""The distributions that vLLM samples from under steering, beside those of the built-in engine.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mavis_dist.decode import Engine, Request, SamplingParams, Scorer

TOP = 40  # tokens of a distribution: the candidates of a steered step


@dataclass(frozen=True, eq=False)
class Step:
    """A steered step, in which vLLM samples."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # so far
    weights: dict[str, float]
    law_V: torch.Tensor


def steerer_of(llm: Any) -> Any:
    """What holds the value models in a vLLM engine of this process."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    processors = runner.input_batch.logitsprocs.non_argmax_invariant
    [steering] = [one for one in processors if type(one).__name__ == "Steering"]
    return steering._steerer


@contextmanager
def seen_steps(llm: Any) -> Iterator[list[Step]]:
    """The steps of requests with the scorer `full` that the block makes."""
    seen: list[Step] = []
    steerer = steerer_of(llm)
    steer = steerer.steer

    def spied(rows: Any, logits_BV: torch.Tensor) -> None:
        contexts = [(row.request.prompt, tuple(row.generated), dict(row.request.weights)) for row in rows]
        steer(rows, logits_BV)
        laws_BV = logits_BV.double().softmax(-1)
        seen.extend(Step(*context, law_V) for context, law_V in zip(contexts, laws_BV, strict=True))

    steerer.steer = spied
    try:
        yield seen
    finally:
        steerer.steer = steer


def largest_difference(engine: Engine, steps: Sequence[Step], beta: float, cap: float) -> float:
    """Of a token's probability in any of the steps, from that which the engine gives it after the same tokens."""
    requests = [
        Request(
            str(number),
            step.prompt,
            step.weights,
            beta,
            cap,
            SamplingParams(len(step.answer) + 1, seed=0),
            step.answer,
            scorer=Scorer.FULL,
            top_logprobs=TOP,
        )
        for number, step in enumerate(steps)
    ]
    largest = 0.0
    for [choice], step in zip(engine.generate(requests), steps, strict=True):
        left_V = step.law_V.clone()
        for candidate in choice.logprobs[0].top:
            left_V[candidate.token] -= math.exp(candidate.logprob)
        largest = max(largest, float(left_V.abs().max()))
    return largest
