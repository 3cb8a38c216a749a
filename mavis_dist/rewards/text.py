"""Rewards computed from the answer's text alone."""

from __future__ import annotations

from collections.abc import Sequence


class Sentiment:
    """VADER compound score, from -1 (negative) to 1 (positive); Hutto and Gilbert, ICWSM 2014."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.analyser = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [self.analyser.polarity_scores(answer)["compound"] for answer in answers]


class Brevity:
    """Minus the number of words."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-float(len(answer.split())) for answer in answers]
