"""Turns a body into a running completion: defaults, templates, checks. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mavis_dist.decode import (
    PRESETS,
    LengthError,
    Preference,
    PreferenceParams,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
    chat_prompts,
)
from mavis_dist.decode.chat import longest_answer
from mavis_dist.decode.validate import Bounds, validate
from mavis_dist.models.chat import text_ids
from mavis_dist.models.load import ModelError
from mavis_dist.types import MAX_COUNT
from serve.gateway.logprobs import Speller
from serve.gateway.protocol import CHAT, TEXT, ApiError
from serve.gateway.refusals import Overloaded, Refusals
from serve.gateway.requests import ChatRequest, GenerationRequest, TextRequest
from serve.gateway.streams import answer_stream
from serve.gateway.write_response import Completion
from serve.messages import OpenStream
from serve.settings import MainArgs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from serve.metrics import Record  # its module imports Ray


class Completions:
    """Turns bodies into running completions."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: MainArgs,
        max_context: int,
        open_stream: OpenStream,
        record: Record | None = None,
    ):
        """
        Args:
            max_context: tokens of prompt and answer that the base model has room for.
            open_stream: the messages of some base replica.
            record: of the streams' metrics, if any.
        """
        self._tokenizer, self._args, self._max_context = tokenizer, args, max_context
        self._open_stream, self._record = open_stream, record
        self._spell = Speller(tokenizer)
        self._vocabulary = 1 + max(tokenizer.get_vocab().values())
        self._refusals = Refusals()

    async def start(
        self,
        body: ChatRequest | TextRequest,
        versions: Mapping[str, str],
        key: str = "",
        request_id: str | None = None,
    ) -> Completion:
        """Begin to generate the answers, all of them with these versions of the objectives.

        Raises ApiError if the request is refused, before anything is sent.

        Args:
            key: name of the caller's API key; keys take turns. Empty: the body's `user`, or one shared key.
            request_id: prefix of the completion's id, for the logs of all deployments.
        """
        key = key or body.user or ""
        rows = body.num_answers * body.num_variants
        try:
            with self._refusals.remembered(key, rows):
                return await self._start(body, versions, key, request_id)
        except Overloaded as error:
            raise ApiError(429, str(error), code="overloaded", retry_after_s=error.wait_s) from None

    async def _start(
        self, body: ChatRequest | TextRequest, versions: Mapping[str, str], key: str, request_id: str | None
    ) -> Completion:
        if body.model != self._args.model_name:
            raise ApiError(
                404,
                f"the model {body.model!r:.100} does not exist here; use {self._args.model_name!r}",
                "model",
                "model_not_found",
            )
        self._check_counts(body)
        # Clients choose the ids of their requests, and may use one twice.
        identity = f"{request_id}-{secrets.token_hex(4)}" if request_id else uuid.uuid4().hex
        # Only the base replica knows whether there are students; it refuses by itself.
        bounds = Bounds(
            versions, self._max_context, predicted=versions, vocabulary=self._vocabulary, max_rows=self._args.rows
        )
        requests: list[Request] = []
        for number, (prompt, preferences) in enumerate(self._prompts(body)):
            try:
                self._check_length(prompt)
                request = validate(self._request(identity, body, prompt, preferences), bounds)
            except RequestError as error:
                raise _refused(error, body, number) from None
            # All prompts share a seed, so that each is answered as if it were alone.
            seed = (requests or [request])[0].params.seed
            requests.append(replace(request, params=replace(request.params, seed=seed)))
        answers = partial(
            answer_stream,
            open_stream=self._open_stream,
            limits=self._args,
            versions={name: versions[name] for name in requests[0].weights},
            record=self._record,
        )
        completion = Completion(
            body,
            CHAT if isinstance(body, ChatRequest) else TEXT,
            requests,
            self._args.model_name,
            self._tokenizer,
            self._spell,
            self._echoed(body, requests),
        )
        try:
            await completion.open(answers, key)
        except RequestError as error:
            raise _refused(error, body) from None
        return completion

    def _check_counts(self, body: ChatRequest | TextRequest) -> None:
        """Bound what multiplies the work of a request before any work is done."""
        num_preferences = len(body.preferences or ())
        for name, count, limit in (
            ("n", body.n or 1, self._args.max_n),
            ("preferences", num_preferences, self._args.max_preferences),
        ):
            if count > limit:
                raise ApiError(400, f"{name}: {count} given; this server takes at most {limit}", name)
        if body.num_answers > self._args.max_n:
            raise ApiError(
                400,
                f"prompt: {body.num_answers // (body.n or 1)} prompts with {body.n or 1} answers each; this server "
                f"gives at most {self._args.max_n} answers to a request: send several requests",
                "prompt",
            )
        if body.num_variants > self._args.rows:
            message = f"preferences: {body.num_variants - 1} given; at most {self._args.rows - 1} fit"
            raise ApiError(400, message, "preferences")

    def _prompts(self, body: ChatRequest | TextRequest) -> Iterator[tuple[tuple[int, ...], tuple[Preference, ...]]]:
        """The token ids of every prompt, plain and with each preference in it; raises ApiError."""
        given = [(preference.text, preference.weight) for preference in body.preferences or ()]
        if isinstance(body, TextRequest):
            for number, prompt in enumerate(body.prompts):
                field = _prompt_field(body, number)
                yield self._text_prompt(prompt, field, given, body.split_special_tokens)
            return
        messages = [message.turn for message in body.messages]
        try:
            yield chat_prompts(self._tokenizer, messages, given, self._args.system, **body.template_options)
        except ModelError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None

    def _text_prompt(
        self, prompt: str | Sequence[int], field: str, preferences: Sequence[tuple[str, float]], splits: bool | None
    ) -> tuple[tuple[int, ...], tuple[Preference, ...]]:
        """`field` is the prompt's name in the body."""

        def ids(text: str, field: str) -> tuple[int, ...]:
            try:
                return tuple(text_ids(self._tokenizer, text, bool(splits)))
            except ModelError as error:
                raise ApiError(400, f"{field}: {error}", field) from None

        if isinstance(prompt, str):
            return ids(prompt, field), tuple(
                Preference(text, ids(f"{text}\n\n{prompt}", f"preferences.{k}.text") if weight else (), weight)
                for k, (text, weight) in enumerate(preferences)
            )
        if preferences:
            message = "preferences: cannot be put into a prompt of token ids; give the prompt as text"
            raise ApiError(400, message, "preferences")
        return tuple(prompt), ()

    def _echoed(self, body: ChatRequest | TextRequest, requests: Sequence[Request]) -> Sequence[str]:
        """Per prompt, the text that its answers begin with."""
        if isinstance(body, ChatRequest):
            return [self._as_held(body.echoed, requests[0].prompt)]
        if not body.echo:
            return [""] * len(requests)
        return [prompt if isinstance(prompt, str) else self._decode(prompt) for prompt in body.prompts]

    def _as_held(self, text: str, prompt: Sequence[int]) -> str:
        """A text as the prompt ends with it: chat templates may trim messages."""
        end = self._decode(prompt) if text else ""
        held = (form for form in (text, text.lstrip(), text.rstrip(), text.strip()) if end.endswith(form))
        return next(held, text)

    def _decode(self, prompt: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _check_length(self, prompt: tuple[int, ...]) -> None:
        limit = self._args.max_prompt_tokens
        if limit is not None and len(prompt) > limit:
            raise LengthError("prompt", f"has {len(prompt)} tokens; this server takes at most {limit}")

    def _request(
        self, identity: str, body: GenerationRequest, prompt: tuple[int, ...], preferences: tuple[Preference, ...]
    ) -> Request:
        settings, default = self._args, SamplingParams()
        limit = body.token_limit
        if limit is not None and limit > settings.max_tokens:
            name = _limit_field(body)
            raise ApiError(400, f"{name} is {limit}; this server generates at most {settings.max_tokens} tokens", name)
        params = SamplingParams(
            max_tokens=limit or longest_answer(prompt, preferences, self._max_context, settings.max_tokens),
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=default.top_k if body.top_k is None else body.top_k if body.top_k > 0 else MAX_COUNT,
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=default.min_p if body.min_p is None else body.min_p,
            seed=body.seed,
            n=body.n or 1,
            stop=body.stops,
        )
        return Request(
            id=identity,
            prompt=prompt,
            weights=body.weights(),
            beta=settings.beta if body.beta is None else body.beta,
            tilt_cap=settings.tilt_cap if body.tilt_cap is None else body.tilt_cap,
            preferences=preferences,
            preference_params=_preference_params(body),
            params=params,
            scorer=Scorer(body.scorer or "lazy"),
            residual_cap=settings.residual_cap if body.residual_cap is None else body.residual_cap,
            guide_every=body.guide_every or 1,
            top_logprobs=body.num_logprobs,
            continues_prompt=body.continues_prompt,
        )


def _preference_params(body: GenerationRequest) -> PreferenceParams:
    """The preset with the body's changes; raises ApiError."""
    given = {} if body.preference_params is None else body.preference_params.model_dump(exclude_none=True)
    preset = PRESETS[given.pop("preset", "mato")]
    optimisation = given.keys() & {"alpha", "lam", "nu", "steps"}
    if optimisation and "c" in given:
        name = f"preference_params.{min(optimisation)}"
        raise ApiError(400, f"{name}: c is given as well and replaces it; leave out one of them", name)
    if optimisation:
        preset = replace(preset, c=None)
    return replace(preset, **given)


def _prompt_field(body: ChatRequest | TextRequest, number: int | None) -> str:
    """The body's name of the prompt `number`, if known."""
    if isinstance(body, ChatRequest):
        return "messages"
    return "prompt" if len(body.prompts) == 1 or number is None else f"prompt.{number}"


def _limit_field(body: GenerationRequest) -> str:
    return "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"


def _refused(error: RequestError, body: ChatRequest | TextRequest, number: int | None = None) -> ApiError:
    """The engine's refusal of the prompt `number`, if known, with the body's names of fields."""
    names = {
        "prompt": _prompt_field(body, number),
        "max_tokens": _limit_field(body),
        "objective_weights": "vllm_xargs.objective_weights" if body.vllm_xargs else "objective_weights",
    }
    param = names.get(error.field, error.field)
    code = "context_length_exceeded" if isinstance(error, LengthError) else None  # clients shorten the prompt then
    return ApiError(400, f"{param}: {error.message}", param, code)
