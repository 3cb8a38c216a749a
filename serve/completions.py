"""From a body to a running completion: defaults, templates, checks. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from mavis_dist.core.preferences import Accumulation
from mavis_dist.decode import (
    PRESETS,
    Preference,
    PreferenceParams,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
    chat_preferences,
)
from mavis_dist.decode.prepare import Bounds, prepare
from mavis_dist.models.load import ModelError, chat_ids
from serve.answers import Limits, OpenStream
from serve.completion import Completion
from serve.schema import (
    CHAT,
    TEXT,
    ApiError,
    ChatRequest,
    GenerationRequest,
    Shape,
    TextRequest,
)
from serve.versions import pinned


@dataclass(frozen=True)
class Settings:
    """What the server decides where a request does not."""

    model: str
    system: str
    max_context: int
    max_tokens: int  # longest answer a request may ask for
    rows: int  # of a base replica; a request's sentences and its plain prompt take one each
    beta: float
    tilt_cap: float | None
    limits: Limits


class Completions:
    """Turns bodies into running completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings, open_stream: OpenStream):
        self._tokenizer, self._settings, self._open_stream = tokenizer, settings, open_stream

    async def start(self, body: ChatRequest | TextRequest, versions: Mapping[str, str]) -> Completion:
        """Begin to write the answers, to their end with these versions of the objectives.

        Raises ApiError before anything is sent if they are refused.
        """
        if body.model != self._settings.model:
            raise ApiError(
                404,
                f"the model {body.model!r} does not exist here; use {self._settings.model!r}",
                "model",
                "model_not_found",
            )
        shape, prompt, preferences = self._prompt(body)
        try:
            # Whether there are students only the base replica knows; it refuses by itself.
            bounds = Bounds(versions, self._settings.max_context, predicted=versions, max_rows=self._settings.rows)
            request = prepare(self._request(body, prompt, preferences), bounds)
        except RequestError as error:
            raise _refused(error, body) from None
        completion = Completion(body, shape, request, self._settings.model, self._settings.limits, self._tokenizer)
        try:
            await completion.open(pinned(self._open_stream, {name: versions[name] for name in request.weights}))
        except RequestError as error:
            raise _refused(error, body) from None
        return completion

    def _prompt(self, body: ChatRequest | TextRequest) -> tuple[Shape, list[int], tuple[Preference, ...]]:
        """The token ids of the plain prompt, and those with each sentence in it."""
        sentences = [(preference.text, preference.weight) for preference in body.preferences or ()]
        if isinstance(body, TextRequest):
            preferences = tuple(
                Preference(text, tuple(self._ids(f"{text}\n\n{body.prompt}")), weight) for text, weight in sentences
            )
            return TEXT, self._ids(body.prompt), preferences
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        system = self._settings.system
        try:
            preferences = chat_preferences(self._tokenizer, messages, sentences, system)
            return CHAT, chat_ids(self._tokenizer, messages, system), preferences
        except ModelError as error:
            raise ApiError(400, str(error), "messages") from None

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _request(self, body: GenerationRequest, prompt: list[int], preferences: tuple[Preference, ...]) -> Request:
        settings, default = self._settings, SamplingParams()
        limit = body.token_limit
        if limit is not None and limit > settings.max_tokens:
            name = _limit_field(body)
            raise ApiError(400, f"{name} is {limit}; this server writes at most {settings.max_tokens} tokens", name)
        longest_prompt = max(len(prompt), *(len(preference.prompt) for preference in preferences), 1)
        params = SamplingParams(
            # A request without a limit gets the longest answer that has room.
            max_tokens=limit or max(1, min(settings.max_tokens, settings.max_context - longest_prompt)),
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=default.top_k if body.top_k is None else body.top_k,
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=default.min_p if body.min_p is None else body.min_p,
            seed=body.seed,
            n=body.n or 1,
            stop=body.stops,
        )
        return Request(
            id=uuid.uuid4().hex,
            prompt=tuple(prompt),
            weights=body.weights(),
            beta=settings.beta if body.beta is None else body.beta,
            tilt_cap=settings.tilt_cap if body.tilt_cap is None else body.tilt_cap,
            preferences=preferences,
            preference_params=_preference_params(body),
            params=params,
            scorer=Scorer(body.scorer or "lazy"),
            guide_every=body.guide_every or 1,
        )


def _preference_params(body: GenerationRequest) -> PreferenceParams:
    """The preset with what the body changes of it."""
    given = {} if body.preference_params is None else body.preference_params.model_dump(exclude_none=True)
    preset = PRESETS[given.pop("preset", "mato")]
    if "accumulation" in given:
        given["accumulation"] = Accumulation(given["accumulation"])
    return replace(preset, **given)


def _limit_field(body: GenerationRequest) -> str:
    return "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"


def _refused(error: RequestError, body: GenerationRequest) -> ApiError:
    """The engine's refusal in the words of the body."""
    names = {
        "prompt": "messages" if isinstance(body, ChatRequest) else "prompt",
        "max_tokens": _limit_field(body),
        "objective_weights": "vllm_xargs.objective_weights" if body.vllm_xargs else "objective_weights",
    }
    param = names.get(error.field, error.field)
    code = "context_length_exceeded" if error.field in ("prompt", "max_tokens") else None
    return ApiError(400, f"{param}: {error.message}", param, code)
