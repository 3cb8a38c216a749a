"""Input and output of the engine: plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean
from typing import NamedTuple

from mavis_dist.core import noise
from mavis_dist.decode.preferences import PRESETS, Preference, PreferenceParams
from mavis_dist.types import RESIDUAL_CAP, TILT_CAP, UserError


class RequestError(UserError):
    """A request that cannot be served. `field` names the invalid part."""

    def __init__(self, field: str, message: str):
        super().__init__(field, message)  # both arguments, so that it pickles
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class LengthError(RequestError):
    """More tokens than there is room for."""


class FinishReason(str, Enum):
    STOP = "stop"  # the model ended the answer
    LENGTH = "length"  # max_tokens was reached
    ABORT = "abort"  # cancelled
    ERROR = "error"  # failed; Choice.error says why


class Scorer(str, Enum):
    """Which candidates the value models evaluate."""

    FULL = "full"  # all of them, as published
    LAZY = "lazy"  # only as many as determine the draw; without a tilt_cap all of them
    PREDICTED = "predicted"  # as lazy, with caps around what a student predicts
    QHEAD = "qhead"  # none: a student predicts from the state what each of them adds to the value


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The defaults sample the reference policy of training (METHOD: T = 1, top 40)."""

    max_tokens: int = 128  # tokens of the whole answer, those of Request.answer included
    temperature: float = 1.0  # 0: the most likely token of the tilted distribution
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn at submission
    n: int = 1  # independent answers
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it


@dataclass(frozen=True)
class Request:
    """One prompt with its steering."""

    id: str
    prompt: tuple[int, ...]  # token ids, chat template applied
    weights: Mapping[str, float] = field(default_factory=dict)  # objective -> weight
    beta: float = 8.0  # nats of tilt per standard deviation of reward
    tilt_cap: float | None = TILT_CAP  # nats; None: unbounded
    params: SamplingParams = SamplingParams()
    answer: tuple[int, ...] = ()  # tokens so far, when an answer is continued
    stream: int | None = None  # noise stream; None: derived from the seed and the choice index
    scorer: Scorer = Scorer.LAZY
    residual_cap: float | None = RESIDUAL_CAP  # of PREDICTED: nats of tilt beyond the prediction; None: unbounded
    guide_every: int = 1  # tilt every n-th token; the others are the base model's
    draws: int | None = None  # generate one token, and report this many distinct draws of it in Choice.alternatives
    top_logprobs: int | None = None  # report every token's distribution with this many most likely tokens; None: no
    preferences: tuple[Preference, ...] = ()
    preference_params: PreferenceParams = PRESETS["mato"]
    continues_prompt: bool = False  # the answer's text goes on from the prompt's; otherwise it is a text of its own

    @property
    def text_before(self) -> tuple[int, ...]:
        """The tokens that the text of the answer goes on from."""
        return self.prompt if self.continues_prompt else ()

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
    """A possible token of a step."""

    token: int
    logprob: float  # log pi(a)
    logratio: float  # log pi(a) - log pi_ref(a)


class TokenLogprobs(NamedTuple):
    """The distribution of one step, as far as the scorer evaluated it; at temperature 0 that of temperature 1."""

    chosen: Candidate
    divergence: float  # KL(pi || pi_ref), nats
    top: tuple[Candidate, ...]  # the most likely first; may lack the chosen one


@dataclass
class Choice:
    """One answer, growing or finished. Lists hold one entry per token that this engine generated."""

    index: int
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    text: str = ""  # when finished: the whole answer, without the stop string
    logratios: list[float] = field(default_factory=list)  # log pi(a) - log pi_ref(a) of the chosen tokens
    divergences: list[float] = field(default_factory=list)  # KL(pi || pi_ref) of the steps, nats; nan at temperature 0
    preference_divergences: list[float] = field(default_factory=list)  # the preferences' part of it, may be negative
    values: dict[str, list[float]] = field(default_factory=dict)  # objective -> V after each token, in sd of its reward
    num_scored: list[int] = field(default_factory=list)  # candidates that value models evaluated
    preference_weights: list[list[float]] = field(default_factory=list)  # of every steering preference
    preference_rewards: list[list[float]] = field(default_factory=list)  # g_k of the tokens, nats
    alternatives: list[Alternative] = field(default_factory=list)  # in the order drawn; with Request.draws
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # with Request.top_logprobs

    @property
    def divergence(self) -> float:
        """Of the whole answer, nats."""
        return math.fsum(self.divergences)

    @property
    def mean_preference_weights(self) -> list[float]:
        """Over the tokens, of every steering preference."""
        return [fmean(weights) for weights in zip(*self.preference_weights, strict=True)]

    @property
    def preference_divergence(self) -> float:
        """The preferences' part of `divergence`: E_pi[log p' - log p], with merged p' and plain p."""
        return math.fsum(self.preference_divergences)


@dataclass(frozen=True)
class Update:
    """What one engine step added to one choice. `start` is the index in the answer of the first new token."""

    request_id: str
    index: int
    start: int
    tokens: tuple[int, ...]
    finished: Choice | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, with Request.top_logprobs
    text: str = ""  # the new part of the answer's text that can no longer change; filled by Engine.stream


def stream_of(request: Request, index: int) -> int:
    """The noise stream of one choice."""
    if request.stream is not None:
        return request.stream
    assert request.params.seed is not None
    return noise.stream(request.params.seed, index)
