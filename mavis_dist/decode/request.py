"""What goes into the engine and what comes out: plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean
from typing import NamedTuple

from mavis_dist.core import noise
from mavis_dist.decode.preferences import PRESETS, Preference, PreferenceParams
from mavis_dist.types import TILT_CAP, UserError


class RequestError(UserError):
    """A request that cannot be served. `field` names the part at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(field, message)  # both arguments, so that it pickles
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class FinishReason(str, Enum):
    STOP = "stop"  # the model ended the answer
    LENGTH = "length"  # max_tokens was reached
    ABORT = "abort"  # cancelled
    ERROR = "error"  # failed; Choice.error says why


class Scorer(str, Enum):
    """Which candidates the value models look at."""

    FULL = "full"  # all of them, as published
    LAZY = "lazy"  # as few as decide the draw; needs a tilt_cap to have anything to leave out
    QHEAD = "qhead"  # none: a student predicts from the state what each of them adds to the value


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The defaults sample the reference policy of training (METHOD: T = 1, top 40)."""

    max_tokens: int = 128  # tokens of the whole answer, those of Request.answer included
    temperature: float = 1.0  # 0: the most likely token of the tilted distribution
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # none: drawn at submission
    n: int = 1  # independent answers
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it


@dataclass(frozen=True)
class Request:
    """One question with its steering."""

    id: str
    prompt: tuple[int, ...]  # token ids, chat template applied
    weights: Mapping[str, float] = field(default_factory=dict)  # objective -> weight
    beta: float = 8.0  # nats of tilt per standard deviation of reward
    tilt_cap: float | None = TILT_CAP  # nats; none: unbounded
    params: SamplingParams = SamplingParams()
    answer: tuple[int, ...] = ()  # tokens written so far, when an answer is continued
    stream: int | None = None  # noise stream; none: derived from the seed and the choice index
    scorer: Scorer = Scorer.LAZY
    guide_every: int = 1  # tilt every so many tokens; the base model writes the others
    draws: int | None = None  # write one token, and report so many distinct draws of it as Choice.alternatives
    top_logprobs: int | None = None  # report the law of every token, with so many of the most likely; none: do not
    preferences: tuple[Preference, ...] = ()  # objectives in words
    preference_params: PreferenceParams = PRESETS["mato"]

    @property
    def is_guided(self) -> bool:
        return self.beta > 0 and any(weight > 0 for weight in self.weights.values())


@dataclass(frozen=True)
class Alternative:
    """One of several draws of the same token."""

    token: int
    logratio: float  # log pi(a) - log pi_ref(a)
    values: dict[str, float]  # objective -> V after the token
    divergence: float  # KL(pi || pi_ref) of the step, the same for all draws


class Candidate(NamedTuple):
    """A token that a step could write."""

    token: int
    logprob: float  # log pi(a)
    logratio: float  # log pi(a) - log pi_ref(a)


class TokenLogprobs(NamedTuple):
    """The law of one step, as far as the scorer knows it; for an answer at temperature 0 that of temperature 1."""

    chosen: Candidate
    divergence: float  # KL(pi || pi_ref), nats
    top: tuple[Candidate, ...]  # the most likely first; the chosen one need not be among them


@dataclass
class Choice:
    """One answer, growing or finished. Lists hold one entry per token that this engine wrote."""

    index: int
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    text: str = ""  # when finished: the whole answer, without what stopped it
    logratios: list[float] = field(default_factory=list)  # log pi(a) - log pi_ref(a) of the chosen tokens
    divergences: list[float] = field(default_factory=list)  # KL(pi || pi_ref) of the steps, nats; nan at temperature 0
    preference_divergences: list[float] = field(default_factory=list)  # the sentences' part of it, may be negative
    values: dict[str, list[float]] = field(default_factory=dict)  # objective -> V after each token, in sd of its reward
    num_scored: list[int] = field(default_factory=list)  # candidates that value models were asked about
    preference_weights: list[list[float]] = field(default_factory=list)  # of every sentence that steers
    preference_rewards: list[list[float]] = field(default_factory=list)  # g_k of the tokens, nats
    alternatives: list[Alternative] = field(default_factory=list)  # in the order drawn; where Request.draws asks
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # where Request.top_logprobs asks

    @property
    def divergence(self) -> float:
        """Spent by the whole answer, nats."""
        return math.fsum(self.divergences)

    @property
    def mean_preference_weights(self) -> list[float]:
        """Over the tokens, of every sentence that steers."""
        return [fmean(weights) for weights in zip(*self.preference_weights, strict=True)]

    @property
    def preference_divergence(self) -> float:
        """The sentences' part of it: E_pi[log p' - log p] with the merged and the plain distribution."""
        return math.fsum(self.preference_divergences)


@dataclass(frozen=True)
class Update:
    """What one engine step added to one choice. `start` is the index in the answer of the first new token."""

    request_id: str
    index: int
    start: int
    tokens: tuple[int, ...]
    finished: Choice | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, where Request.top_logprobs asks
    text: str = ""  # what became certain of the answer's text; filled by Engine.stream


def stream_of(request: Request, index: int) -> int:
    """The noise stream of one choice."""
    if request.stream is not None:
        return request.stream
    assert request.params.seed is not None
    return noise.stream(request.params.seed, index)
