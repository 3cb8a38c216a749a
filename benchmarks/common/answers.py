"""Generates answers to unseen prompts under many settings in one engine, so that its batch stays full. No Ray.

Lists are P long: one entry per prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mavis_dist.decode import Choice, Engine, FinishReason, Request
from mavis_dist.rewards.protocol import Reward
from mavis_dist.rollout.trees import RolloutError

Setting = TypeVar("Setting", bound=Hashable)


@dataclass(frozen=True)
class Answers:
    """One answer per prompt under one setting."""

    text: list[str]
    num_tokens: list[int]
    divergence: list[float]  # exact KL(pi || pi_ref) of the whole answer, nats
    reward: dict[str, list[float]]  # by objective, in the reward's own unit


def generate(engine: Engine, requests: Mapping[Setting, Sequence[Request]]) -> Iterator[tuple[Setting, list[Choice]]]:
    """Yields each setting with its answers, in the order of its requests, as soon as all of them are finished.

    Raises:
        RolloutError: an answer ended in an error.
    """
    settings = list(requests)
    for s, setting in enumerate(settings):
        for p, request in enumerate(requests[setting]):
            engine.submit(replace(request, id=f"{s}/{p}"))
    finished: list[dict[int, Choice]] = [{} for _ in settings]
    while not engine.is_idle:
        for update in engine.step():
            if update.finished is None:
                continue
            s, p = map(int, update.request_id.split("/"))
            if update.finished.finish not in (FinishReason.STOP, FinishReason.LENGTH):
                raise RolloutError(f"{settings[s]}, prompt {p}: {update.finished.error}")
            finished[s][p] = update.finished
            if len(finished[s]) == len(requests[settings[s]]):
                yield settings[s], [finished[s][p] for p in range(len(finished[s]))]


def score(choices: Sequence[Choice], questions: Sequence[str], rewards: Mapping[str, Reward]) -> Answers:
    """Texts, lengths, divergences and rewards of finished answers."""
    texts = [choice.text for choice in choices]
    return Answers(
        text=texts,
        num_tokens=[len(choice.tokens) for choice in choices],
        divergence=[choice.divergence for choice in choices],
        reward={name: reward.score(questions, texts) for name, reward in rewards.items()},
    )
