"""Builds the reward of an objective's settings, with checked scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from mavis_dist import sections
from mavis_dist.rewards.classifier import Classifier
from mavis_dist.rewards.embedding import Relevance
from mavis_dist.rewards.function import Function
from mavis_dist.rewards.judge import RETRIES, Judge
from mavis_dist.rewards.protocol import Reward, RewardError
from mavis_dist.rewards.text import Brevity, Sentiment
from mavis_dist.sections import Objective


class Checked:
    """Checks that a reward returns one finite float per answer."""

    def __init__(self, inner: Reward, kind: str) -> None:
        self.inner, self.kind = inner, kind

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        if len(prompts) != len(answers):
            raise RewardError(f"reward {self.kind!r} was given {len(prompts)} prompts for {len(answers)} answers")
        if not answers:
            return []
        scores = self._as_list(self.inner.score(prompts, answers))
        if len(scores) != len(answers):
            raise RewardError(f"reward {self.kind!r} returned {len(scores)} scores for {len(answers)} answers")
        return [self._as_float(score, index) for index, score in enumerate(scores)]

    def _as_list(self, scores: Any) -> list[Any]:
        has_order = not isinstance(scores, (str, bytes, Mapping, Set))
        try:
            if has_order:
                return list(scores)
        except TypeError:
            pass
        raise RewardError(f"reward {self.kind!r} returned {type(scores).__name__}, not a list of floats")

    def _as_float(self, score: Any, index: int) -> float:
        is_number = not isinstance(score, (str, bytes)) and getattr(score, "ndim", 0) == 0
        try:
            number = float(score) if is_number else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward {self.kind!r} returned {score!r:.80} for answer {index}: it must be a finite number"
            )
        return number


def build(objective: Objective, device: str = "cpu", retries: int = RETRIES) -> Reward:
    """The reward that an objective's settings describe; `device` is where its model runs, if it has one, and `retries`
    is how often an endpoint is asked again that does not answer.

    A wrong number of scores, or one that is not finite, raises RewardError.

    Raises:
        RewardError or ModelError: naming the setting or file and the remedy.
    """
    kind = objective.path if isinstance(objective, sections.Function) else objective.reward
    return Checked(_build(objective, device, retries), kind)


def score_parts(objective: Objective, parts: Sequence[Sequence[tuple[str, str]]]) -> list[list[float]]:
    """Rewards of pairs of prompt and answer, every part by itself: they may depend by rounding on what they are scored
    with, but not on the other parts.
    """
    reward = build(objective)
    return [reward.score([prompt for prompt, _ in part], [answer for _, answer in part]) for part in parts]


def _build(objective: Objective, device: str, retries: int) -> Reward:
    match objective:
        case sections.TextRule(reward="sentiment"):
            return Sentiment()
        case sections.TextRule():
            return Brevity()
        case sections.Relevance(model=model):
            return Relevance(model, device)
        case sections.Classifier():
            return Classifier(objective.model, objective.label, objective.template, objective.output, device)
        case sections.Judge(criterion=criterion):
            return Judge(objective, criterion, retries)
        case sections.Function(path=path):
            return Function(path)
