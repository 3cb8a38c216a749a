"""What goes into the engine and what comes out: plain values, checked before any tensor is made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from mavis_dist.core import noise
from mavis_dist.types import MAX_COUNT, TILT_CAP, UserError


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
    values: dict[str, list[float]] = field(default_factory=dict)  # objective -> V after each token, in sd of its reward
    num_scored: list[int] = field(default_factory=list)  # candidates that value models were asked about
    alternatives: list[Alternative] = field(default_factory=list)  # in the order drawn; where Request.draws asks

    @property
    def divergence(self) -> float:
        """Spent by the whole answer, nats."""
        return math.fsum(self.divergences)


@dataclass(frozen=True)
class Update:
    """What one engine step added to one choice. `start` is the index in the answer of the first new token."""

    request_id: str
    index: int
    start: int
    tokens: tuple[int, ...]
    finished: Choice | None = None
    text: str = ""  # what became certain of the answer's text; filled by Engine.stream


def normalise_weights(weights: Mapping[str, float], objectives: Collection[str]) -> dict[str, float]:
    """Weights that sum to 1, without those that are 0; empty if all are 0.

    Raises:
        RequestError: a weight is negative or not finite, or its objective does not exist.
    """
    for name, weight in weights.items():
        if name not in objectives:
            known = ", ".join(sorted(objectives)) or "none"
            raise RequestError("objective_weights", f"there is no objective {name!r}; available: {known}")
        if not (math.isfinite(weight) and weight >= 0):
            raise RequestError("objective_weights", f"the weight of {name!r} is {weight}; use a finite number >= 0")
    largest = max(weights.values(), default=0.0)
    shares = {name: weight / largest for name, weight in weights.items() if weight > 0}  # their sum is finite
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def prepare(
    request: Request,
    objectives: Collection[str],
    max_context: int,
    cache_tokens: int | None = None,
    vocabulary: int | None = None,
    predicted: Collection[str] = (),
) -> Request:
    """The request with normalised weights and a seed, or a RequestError that names the field, value and remedy.

    `predicted` are the objectives that the guide has a student for.
    """
    params = request.params

    def refuse_unless(condition: bool, name: str, remedy: str) -> None:
        if not condition:
            value = getattr(params, name) if hasattr(params, name) else getattr(request, name)
            raise RequestError(name, f"is {value!r}; {remedy}")

    refuse_unless(_is_number(params.temperature) and params.temperature >= 0, "temperature", "use a number >= 0")
    refuse_unless(1 <= params.top_k <= MAX_COUNT, "top_k", f"use an integer from 1 to {MAX_COUNT}")
    refuse_unless(_is_number(params.top_p) and 0 < params.top_p <= 1, "top_p", "use a number in (0, 1]")
    refuse_unless(_is_number(params.min_p) and 0 <= params.min_p < 1, "min_p", "use a number in [0, 1)")
    refuse_unless(params.n >= 1, "n", "use an integer >= 1")
    refuse_unless(_is_number(request.beta) and request.beta >= 0, "beta", "use a number >= 0")
    refuse_unless(request.tilt_cap is None or request.tilt_cap > 0, "tilt_cap", "use a number > 0, or none")
    refuse_unless(1 <= request.guide_every <= MAX_COUNT, "guide_every", f"use an integer from 1 to {MAX_COUNT}")
    refuse_unless(
        request.stream is None or params.n == 1, "stream", "several answers need noise of their own: use n = 1"
    )
    refuse_unless(all(params.stop), "stop", "use texts that are not empty")
    if not request.prompt:
        raise RequestError("prompt", "is empty; give at least one token")
    for name, tokens in (("prompt", request.prompt), ("answer", request.answer)):
        unknown = [token for token in tokens if vocabulary is not None and not 0 <= token < vocabulary]
        if unknown:
            raise RequestError(name, f"has the token {unknown[0]}; the model has {vocabulary} tokens, from 0 on")
    longest_answer = max_context - len(request.prompt)
    if longest_answer < 1:
        raise RequestError(
            "prompt", f"has {len(request.prompt)} tokens; the context of {max_context} leaves no room for an answer"
        )
    refuse_unless(
        len(request.answer) < params.max_tokens <= longest_answer,
        "max_tokens",
        f"with a prompt of {len(request.prompt)} tokens use an integer from {len(request.answer) + 1} "
        f"to {longest_answer}",
    )
    if cache_tokens is not None and len(request.prompt) + params.max_tokens > cache_tokens:
        raise RequestError(
            "max_tokens",
            f"is {params.max_tokens}; with a prompt of {len(request.prompt)} tokens the engine's cache of "
            f"{cache_tokens} tokens leaves room for {max(0, cache_tokens - len(request.prompt))}",
        )
    weights = normalise_weights(request.weights, objectives)
    if request.scorer is Scorer.QHEAD:
        missing = sorted(weights.keys() - set(predicted)) or ["any objective"] * (not predicted)
        if missing:
            raise RequestError(
                "scorer", f"is 'qhead'; there is no student for {', '.join(missing)}: use 'lazy' or 'full'"
            )
    if request.draws is not None:
        refuse_unless(request.draws >= 1, "draws", "use an integer >= 1, or none")
        refuse_unless(request.is_guided, "draws", "draws are told apart by value: use a weight > 0 and beta > 0")
        # The lazy scorer knows the best candidate, not the second.
        refuse_unless(request.scorer is Scorer.FULL, "scorer", "several draws of a token need Scorer.FULL")
        refuse_unless(request.guide_every == 1, "guide_every", "several draws of a token need 1")
        refuse_unless(
            params.max_tokens == len(request.answer) + 1,
            "max_tokens",
            f"a request with draws writes one token: use {len(request.answer) + 1}",
        )
    seed = params.seed if params.seed is not None else secrets.randbits(32)
    return replace(request, weights=weights, params=replace(params, seed=seed))


def stream_of(request: Request, index: int) -> int:
    """The noise stream of one choice."""
    if request.stream is not None:
        return request.stream
    assert request.params.seed is not None
    return noise.stream(request.params.seed, index)


def _is_number(value: float) -> bool:
    return math.isfinite(value)
