"""Plain values that cross process borders: frozen, picklable, free of torch and ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

BASE_POLICY = "base"
R2_KEY = "explained_variance"  # name of R² in stored cards, metrics and the HTTP API
NEUTRAL_SYSTEM = "You are a helpful assistant."  # for conversations without a system prompt

# Upper bound of one token's tilt, in nats. At 3 the next-token distribution differs from the unbounded one by less than
# 0.01 in total variation, for every objective measured, and most candidates need not be evaluated.
TILT_CAP = 3.0
# The same of the part of the tilt that a student does not predict, for the scorer `predicted`.
RESIDUAL_CAP = 1.0
MAX_COUNT = 2**31 - 1  # largest top_k and guide_every: far beyond use, and safe in any integer tensor


class Stopped(Exception):
    """The job was asked to stop; finished work is saved."""


class UserError(ValueError):
    """Input that cannot be used; the message is one sentence that names the setting, its value and the remedy."""


class StageError(UserError):
    """An exception of a stage that would end every further attempt in the same way; one line says what and where."""


def one_line(reason: object, limit: int = 200) -> str:
    """The start of a message that may span many lines."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text[:limit].rstrip(" .:")


def text_fault(text: str) -> str | None:
    """What of a text can be neither encoded nor stored; None if nothing."""
    if "\0" in text:
        return "a NUL character"
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    return None if half is None else f"half of a surrogate pair ({half!r}), which UTF-8 does not have"


@dataclass(frozen=True)
class Prompt:
    """What the base model is asked, before any chat template: a question, or a conversation that ends with one."""

    id: str
    text: str  # what rewards and reports read; of a conversation all that was said, without system messages
    turns: tuple[tuple[str, str], ...] = ()  # role and text of every turn; empty: `text` is the only one

    @property
    def messages(self) -> list[dict[str, str]]:
        """In the format of chat templates."""
        return [{"role": role, "content": text} for role, text in self.turns or (("user", self.text),)]


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of one objective's raw reward over the iteration-0 training leaves.

    Every value, target and weight in the system is in units of `sd`, so that beta means the same for all objectives.
    """

    mean: float
    sd: float

    def standardise(self, score: float) -> float:
        return (score - self.mean) / self.sd


@dataclass(frozen=True)
class Policy:
    """The policy that generates a tree: the base model, or its tilt by one objective's value model."""

    objective: str | None = None
    iteration: int = 0  # of the trees it generates

    @property
    def name(self) -> str:
        return BASE_POLICY if self.objective is None else f"{self.objective}-i{self.iteration}"


def parse_weights(text: str) -> dict[str, float]:
    """`positive=0.7,brief=0.3` -> weights; raises UserError that quotes the part at fault."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight):
            raise UserError(
                f"{part!r} is not name=weight with a finite weight and a name of its own; write positive=0.7,brief=0.3"
            )
        weights[name] = weight
    return weights
