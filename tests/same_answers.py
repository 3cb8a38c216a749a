"""Whether a run answers alike in Python and over HTTP: the same question, weights and seed, in float32."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks.common.http_load import closed_loop
from mavis_dist.llm import LLM

QUESTIONS = ("How do I make good coffee?", "I start a new job on Monday.", "Why is the sky blue?", "Tell me a story")


@dataclass(frozen=True)
class Difference:
    """An answer that is not the same."""

    question: str
    weights: dict[str, float]
    temperature: float
    seed: int
    python: str
    http: str


def differences(
    llm: LLM, url: str, model: str, clients: ProcessPoolExecutor, num_pairs: int, max_tokens: int, num_clients: int = 16
) -> list[Difference]:
    """Ask with random weights of two objectives, greedy and sampled: 2 * `num_pairs` answers each way.

    Args:
        url: a service of the run that `llm` has loaded; both in float32.
        model: the name of the model there.
        clients: the process that sends the requests, of `http_load.client_process`.
    """
    source, objectives = random.Random(0), llm.objectives
    pairs = [{name: source.random() for name in source.sample(objectives, 2)} for _ in range(num_pairs)]
    asked = [
        (QUESTIONS[seed % len(QUESTIONS)], weights, temperature, seed)
        for seed, weights in enumerate(pairs)
        for temperature in (0.0, 1.0)
    ]
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "objective_weights": weights,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        for question, weights, temperature, seed in asked
    ]
    load = closed_loop(clients, url, bodies, num_clients)
    requests = [
        llm.request(question, weights, temperature=temperature, seed=seed, max_tokens=max_tokens)
        for question, weights, temperature, seed in asked
    ]
    texts = [answer.text for [answer] in llm.generate(requests)]
    served = {outcome.body_index: outcome.text for outcome in load.result().outcomes if outcome.is_whole}
    return [
        Difference(*one, python=text, http=served.get(index, "no answer"))
        for index, (one, text) in enumerate(zip(asked, texts, strict=True))
        if served.get(index) != text
    ]
