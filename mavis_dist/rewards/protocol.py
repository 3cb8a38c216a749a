"""The interface of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mavis_dist.types import UserError


class RewardError(UserError):
    """A reward that cannot be built or has returned something unusable; the message is one sentence."""


class Reward(Protocol):
    """Scores answers for one objective, with `train.targets: prefix` unfinished ones as well; higher is better."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One finite score per pair of prompt and answer, both of length N, plain text without a chat template."""
        ...
