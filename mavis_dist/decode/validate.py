"""Validation of requests before any tensor is created: errors name the field, its value and the remedy."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mavis_dist.decode.preferences import Preference, PreferenceParams
from mavis_dist.decode.request import LengthError, Request, RequestError, SamplingParams, Scorer
from mavis_dist.types import MAX_COUNT

MAX_STRENGTH = 8.0  # of preferences; beyond it answers become incoherent
MAX_STEPS = 10_000  # of online optimisation
# Far beyond practical values, and safe in any sum and quotient.
MAX_BETA = 1e6
SUM_TOLERANCE = 1e-12  # of weights that sum to 1; larger than rounding errors
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclass(frozen=True)
class Bounds:
    """The limits of an engine; None: unknown or unbounded."""

    objectives: Collection[str]
    max_context: int
    predicted: Collection[str] = ()  # objectives that the guide has a student for
    vocabulary: int | None = None
    cache_tokens: int | None = None
    max_rows: int | None = None


def validate(request: Request, bounds: Bounds) -> Request:
    """The request with a seed and with normalised weights, without those that are 0; raises RequestError."""
    _check_preference_params(request.preference_params)
    request = replace(
        request,
        weights=normalise_weights(request.weights, bounds.objectives),
        preferences=normalise_preferences(request.preferences, request.preference_params),
    )
    _check_sampling(request.params)
    _check_steering(request, bounds)
    _check_tokens(request, bounds)
    _check_room(request, bounds)
    if request.draws is not None:
        _check_draws(request)
    seed = request.params.seed if request.params.seed is not None else secrets.randbits(32)
    return replace(request, params=replace(request.params, seed=seed))


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
    shares = zip(weights, _shares(list(weights.values())), strict=True)
    return {name: share for name, share in shares if share > 0}


def normalise_preferences(preferences: tuple[Preference, ...], params: PreferenceParams) -> tuple[Preference, ...]:
    """The preferences whose weights are not 0, with weights that sum to 1, or as given without `params.normalise`.

    Raises:
        RequestError: a text is empty, a weight is out of range, or all weights are 0.
    """
    for number, preference in enumerate(preferences):
        _require(bool(preference.text.strip()), f"preferences.{number}.text", preference.text, "state the preference")
        field, weight = f"preferences.{number}.weight", preference.weight
        _require(math.isfinite(weight), field, weight, "use a finite number")
        if params.normalise:
            _require(weight >= 0, field, weight, "use a number >= 0, or preference_params.normalise: false")
        elif not abs(weight) * params.strength <= MAX_STRENGTH:
            limit = f"a strength times c = {params.strength:g} must lie between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
            raise RequestError(field, f"is {weight!r}; {limit}")
    weights = [preference.weight for preference in preferences]
    if weights and not any(weights):
        raise RequestError("preferences", "all weights are 0; use a weight > 0, or give no preferences")
    shares = _shares(weights) if params.normalise else weights
    weighted = (replace(preference, weight=share) for preference, share in zip(preferences, shares, strict=True))
    return tuple(preference for preference in weighted if preference.weight != 0)


def _shares(weights: Sequence[float]) -> list[float]:
    """Finite weights >= 0, scaled to sum to 1; all 0 if all are 0. Weights that already sum to 1 are returned
    unchanged, to the last bit: a request may be validated several times.
    """
    largest = max(weights, default=0.0) or 1.0
    scaled = [weight / largest for weight in weights]  # their sum is finite
    total = math.fsum(scaled)
    if total == 0 or abs(largest * total - 1) <= SUM_TOLERANCE:
        return list(weights)
    return [weight / total for weight in scaled]


def _check_sampling(params: SamplingParams) -> None:
    for name, is_fine, remedy in (
        (
            "temperature",
            params.temperature == 0 or MIN_TEMPERATURE <= params.temperature <= MAX_TEMPERATURE,
            f"use 0, or a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
        ),
        ("top_k", 1 <= params.top_k <= MAX_COUNT, f"use an integer from 1 to {MAX_COUNT}"),
        ("top_p", 0 < params.top_p <= 1, "use a number in (0, 1]"),
        ("min_p", 0 <= params.min_p < 1, "use a number in [0, 1)"),
        ("n", params.n >= 1, "use an integer >= 1"),
        ("stop", all(params.stop), "use non-empty texts"),
    ):
        _require(is_fine, name, getattr(params, name), remedy)


def _check_steering(request: Request, bounds: Bounds) -> None:
    for name, is_fine, remedy in (
        ("beta", 0 <= request.beta <= MAX_BETA, f"use a number from 0 to {MAX_BETA:g}"),
        *(
            (name, (cap := getattr(request, name)) is None or cap > 0, "use a number > 0, or none")
            for name in ("tilt_cap", "residual_cap")
        ),
        ("top_logprobs", (request.top_logprobs or 0) >= 0, "use an integer >= 0, or none"),
        ("guide_every", 1 <= request.guide_every <= MAX_COUNT, f"use an integer from 1 to {MAX_COUNT}"),
        (
            "stream",
            request.stream is None or request.params.n == 1,
            "every answer needs its own noise stream: use n = 1",
        ),
    ):
        _require(is_fine, name, getattr(request, name), remedy)
    if request.scorer in (Scorer.QHEAD, Scorer.PREDICTED):
        missing = sorted(request.weights.keys() - set(bounds.predicted)) or ["any objective"] * (not bounds.predicted)
        if missing:
            raise RequestError(
                "scorer",
                f"is {request.scorer.value!r}; there is no student for {', '.join(missing)}: use 'lazy' or 'full'",
            )


def _check_preference_params(params: PreferenceParams) -> None:
    positive = ("tau", "lam", "nu")
    for name, is_fine, remedy in (
        ("clip", params.clip > 0, "use a number > 0"),
        *((name, 0 < getattr(params, name) < math.inf, "use a number > 0") for name in positive),
        ("alpha", 0 <= params.alpha < math.inf, "use a number >= 0"),
        ("steps", 0 <= params.steps <= MAX_STEPS, f"use an integer from 0 to {MAX_STEPS}"),
        ("decay", 0 <= params.decay <= 1, "use a number from 0 to 1"),
        ("top_p", 0 < params.top_p <= 1, "use a number in (0, 1]"),
        ("c", params.c is None or 0 <= params.c <= MAX_STRENGTH, f"use a number from 0 to {MAX_STRENGTH:g}, or none"),
        ("adapt", params.normalise or not params.adapt, "strengths (normalise: false) do not adapt: use false"),
    ):
        _require(is_fine, f"preference_params.{name}", getattr(params, name), remedy)
    if not params.strength <= MAX_STRENGTH:
        raise RequestError(
            "preference_params.alpha",
            f"is {params.alpha}; with lam {params.lam}, nu {params.nu} and {params.steps} steps the strength becomes "
            f"{params.strength:.4g}, above {MAX_STRENGTH:g}: lower alpha or steps, raise lam, or give c",
        )


def _check_tokens(request: Request, bounds: Bounds) -> None:
    texts = [("prompt", request.prompt), ("answer", request.answer)]
    texts += [("preferences", preference.prompt) for preference in request.preferences]
    for preference in request.preferences:
        if preference.prompt == request.prompt:
            raise RequestError(
                "preferences",
                f"{preference.text!r:.60} changes nothing in the prompt: the model's chat template drops it; start "
                f"with a system or user turn, or use a model whose template accepts system texts",
            )
    for name, tokens in texts:
        if bounds.vocabulary is not None:
            unknown = next((t for t in tokens if not 0 <= t < bounds.vocabulary), None)
            if unknown is not None:
                raise RequestError(name, f"has the token {unknown}; use tokens from 0 to {bounds.vocabulary - 1}")
        if not tokens and name != "answer":
            raise RequestError(name, "is empty; give at least one token")


def _check_room(request: Request, bounds: Bounds) -> None:
    """Whether the longest variant fits the model's context, and all of them the engine."""
    num_prompt, num_variants = len(request.prompt), 1 + len(request.preferences)
    if num_prompt >= bounds.max_context:
        raise LengthError(
            "prompt", f"has {num_prompt} tokens; the context of {bounds.max_context} leaves no room for an answer"
        )
    longest = max(request.preferences, key=lambda preference: len(preference.prompt), default=None)
    if longest is not None and len(longest.prompt) > num_prompt:
        num_prompt = len(longest.prompt)
        if num_prompt >= bounds.max_context:
            raise LengthError(
                "preferences",
                f"with {longest.text!r:.60} the prompt has {num_prompt} tokens; the context of {bounds.max_context} "
                f"leaves no room for an answer: use shorter preferences",
            )
    num_given, longest_answer = len(request.answer), bounds.max_context - num_prompt
    _require(
        num_given < request.params.max_tokens <= longest_answer,
        "max_tokens",
        request.params.max_tokens,
        f"with a prompt of {num_prompt} tokens use an integer from {num_given + 1} to {longest_answer}",
        LengthError,
    )
    if bounds.max_rows is not None and num_variants > bounds.max_rows:
        raise RequestError(
            "preferences",
            f"{num_variants - 1} given; at most {bounds.max_rows - 1} fit: each takes one of the engine's "
            f"{bounds.max_rows} rows, the plain prompt another",
        )
    if bounds.cache_tokens is not None:
        room = bounds.cache_tokens // num_variants - num_prompt
        _require(
            request.params.max_tokens <= room,
            "max_tokens",
            request.params.max_tokens,
            f"with {num_variants} prompts of up to {num_prompt} tokens the engine's cache of {bounds.cache_tokens} "
            f"tokens leaves room for {max(0, room)}",
            LengthError,
        )


def _check_draws(request: Request) -> None:
    assert request.draws is not None
    if request.preferences:
        raise RequestError("preferences", "cannot be combined with several draws of a token, as in a beam search")
    num_given = len(request.answer)
    for name, is_fine, remedy in (
        ("draws", request.draws >= 1, "use an integer >= 1, or none"),
        ("draws", request.is_guided, "draws are ranked by value: use a weight > 0 and beta > 0"),
        # The lazy scorer finds the best candidate only, not the second.
        ("scorer", request.scorer is Scorer.FULL, "several draws of a token need Scorer.FULL"),
        ("guide_every", request.guide_every == 1, "several draws of a token need 1"),
    ):
        _require(is_fine, name, getattr(request, name), remedy)
    _require(
        request.params.max_tokens == num_given + 1,
        "max_tokens",
        request.params.max_tokens,
        f"a request with draws generates one token: use {num_given + 1}",
    )


def _require(condition: bool, field: str, value: Any, remedy: str, error: type[RequestError] = RequestError) -> None:
    if not condition:
        raise error(field, f"is {value!r}; {remedy}")
