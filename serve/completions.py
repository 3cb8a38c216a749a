"""One completion from its body to its response: n answers written side by side. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from mavis_dist.decode import Choice, Request, RequestError, SamplingParams
from mavis_dist.decode.request import prepare, stream_of
from mavis_dist.models.load import ModelError, chat_ids
from serve.answers import AnswerFailed, Detokenizer, Limits, OpenStream, Piece, follow
from serve.schema import (
    CHAT,
    DONE,
    TEXT,
    ApiError,
    ChatRequest,
    GenerationRequest,
    Json,
    Shape,
    TextRequest,
    event,
    usage,
)


@dataclass(frozen=True)
class Settings:
    """What the server decides where a request does not."""

    model: str
    system: str
    max_context: int
    max_tokens: int  # longest answer a request may ask for
    beta: float
    tilt_cap: float | None
    limits: Limits


class Completions:
    """Turns bodies into running completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings, open_stream: OpenStream):
        self._tokenizer, self._settings, self._open_stream = tokenizer, settings, open_stream

    async def start(self, body: ChatRequest | TextRequest, objectives: Mapping[str, int]) -> Completion:
        """Begin to write the answers; raises ApiError before anything is sent if they are refused."""
        if body.model != self._settings.model:
            raise ApiError(
                404,
                f"the model {body.model!r} does not exist here; use {self._settings.model!r}",
                "model",
                "model_not_found",
            )
        shape, prompt = self._prompt(body)
        try:
            request = prepare(self._request(body, prompt), objectives, self._settings.max_context)
        except RequestError as error:
            raise _refused(error, body) from None
        completion = Completion(body, shape, request, self._settings, self._tokenizer)
        try:
            await completion.open(self._open_stream)
        except RequestError as error:
            raise _refused(error, body) from None
        return completion

    def _prompt(self, body: ChatRequest | TextRequest) -> tuple[Shape, list[int]]:
        if isinstance(body, TextRequest):
            return TEXT, list(self._tokenizer(body.prompt)["input_ids"])
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        try:
            return CHAT, chat_ids(self._tokenizer, messages, self._settings.system)
        except ModelError as error:
            raise ApiError(400, str(error), "messages") from None

    def _request(self, body: GenerationRequest, prompt: list[int]) -> Request:
        settings, default = self._settings, SamplingParams()
        limit = body.token_limit
        if limit is not None and limit > settings.max_tokens:
            name = _limit_field(body)
            raise ApiError(400, f"{name} is {limit}; this server writes at most {settings.max_tokens} tokens", name)
        params = SamplingParams(
            # A request without a limit gets the longest answer that has room.
            max_tokens=limit or max(1, min(settings.max_tokens, settings.max_context - len(prompt))),
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=default.top_k if body.top_k is None else body.top_k,
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=default.min_p if body.min_p is None else body.min_p,
            seed=body.seed,
            n=body.n or 1,
        )
        return Request(
            id=uuid.uuid4().hex,
            prompt=tuple(prompt),
            weights=body.weights(),
            beta=settings.beta if body.beta is None else body.beta,
            tilt_cap=settings.tilt_cap if body.tilt_cap is None else body.tilt_cap,
            params=params,
        )


@dataclass
class _Answer:
    """One choice while it is written."""

    text: Detokenizer
    pieces: list[str] = field(default_factory=list)
    num_tokens: int = 0
    last: Piece | None = None

    def add(self, piece: Piece) -> str:
        text = self.text.add(piece.tokens, last=piece.finished is not None)
        self.pieces.append(text)
        self.num_tokens += len(piece.tokens)
        self.last = piece
        return text

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finished is not None

    @property
    def finish_reason(self) -> str:
        return self._choice.finish.value  # type: ignore[union-attr]

    @property
    def report(self) -> Json:
        """What steering did to this answer; null where it is not known."""
        choice = self._choice
        assert self.last is not None
        # A base replica counts only what it wrote itself.
        divergence = None if self.last.resumed or not math.isfinite(choice.divergence) else choice.divergence
        num_own = len(choice.logratios)
        return {
            "divergence": divergence,
            "values": choice.values,
            "candidates_per_token": choice.num_scored / num_own if num_own else 0.0,
        }

    @property
    def _choice(self) -> Choice:
        assert self.last is not None
        assert self.last.finished is not None
        return self.last.finished


class Completion:
    """The answers to one body, on their way."""

    def __init__(
        self,
        body: GenerationRequest,
        shape: Shape,
        request: Request,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._body, self._shape, self._request, self._settings = body, shape, request, settings
        self._answers = [_Answer(Detokenizer(tokenizer)) for _ in range(request.params.n)]
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._head: Json = {
            "id": f"{shape.id_prefix}-{request.id}",
            "created": int(time.time()),
            "model": settings.model,
        }

    @property
    def _echo(self) -> Json:
        request = self._request
        return {
            "objective_weights": dict(request.weights),
            "beta": request.beta,
            "tilt_cap": request.tilt_cap,
            "seed": request.params.seed,
        }

    async def open(self, open_stream: OpenStream) -> None:
        """Submit every choice as a request of its own, so that each can move to another base replica."""
        accepted: list[asyncio.Future[None]] = []
        for index in range(len(self._answers)):
            one = replace(
                self._request,
                id=f"{self._request.id}-{index}",
                stream=stream_of(self._request, index),
                params=replace(self._request.params, n=1),
            )
            accepted.append(asyncio.get_running_loop().create_future())
            self._tasks.append(asyncio.create_task(self._pump(index, one, open_stream, accepted[index])))
        try:
            await asyncio.gather(*accepted)
        except AnswerFailed as error:
            self.close()
            raise ApiError(503, str(error), code="engine_unavailable") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop writing; the rows of unfinished answers become free."""
        for task in self._tasks:
            task.cancel()

    async def whole(self) -> Json:
        """The response body, once all answers are finished."""
        try:
            async for _ in self._pieces():
                pass
        finally:
            self.close()
        choices = [
            {
                "index": index,
                **self._shape.whole("".join(answer.pieces)),
                "finish_reason": answer.finish_reason,
                "logprobs": None,
                "mavis": answer.report,
            }
            for index, answer in enumerate(self._answers)
        ]
        head = {**self._head, "object": self._shape.whole_object}
        return {**head, "choices": choices, "usage": self._usage(), "mavis": self._echo}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; the last one is [DONE] or an error."""
        try:
            if self._shape.opening is not None:
                for index in range(len(self._answers)):
                    yield self._chunk({"index": index, **self._shape.opening})
            async for index, text in self._pieces():
                if text:
                    yield self._chunk({"index": index, **self._shape.piece(text)})
                answer = self._answers[index]
                if answer.is_finished:
                    ending = {**self._shape.ending, "finish_reason": answer.finish_reason, "mavis": answer.report}
                    yield self._chunk({"index": index, **ending}, mavis=self._echo)
            if self._body.wants_usage:
                yield self._chunk({}, usage=self._usage())
            yield DONE
        except ApiError as error:
            yield event(error.body)
        finally:
            self.close()

    def _chunk(self, choice: Json, **extra: Json) -> str:
        """One event about one choice, or about none."""
        choices = [{"finish_reason": None, "logprobs": None, **choice}] if choice else []
        return event({**self._head, "object": self._shape.chunk_object, "choices": choices, **extra})

    def _usage(self) -> Json:
        return usage(len(self._request.prompt), sum(answer.num_tokens for answer in self._answers))

    async def _pieces(self) -> AsyncIterator[tuple[int, str]]:
        """(choice, text) as it comes, until all choices are finished; raises ApiError."""
        left = len(self._answers)
        while left:
            index, item = await self._queue.get()
            if isinstance(item, Exception):
                raise ApiError(500, str(item), code="engine_error")
            left -= item.finished is not None
            yield index, self._answers[index].add(item)

    async def _pump(
        self, index: int, request: Request, open_stream: OpenStream, accepted: asyncio.Future[None]
    ) -> None:
        """Follow one choice into the common queue; what goes wrong before acceptance is the acceptance's result."""
        try:
            async with aclosing(follow(request, open_stream, self._settings.limits)) as items:
                async for item in items:
                    if isinstance(item, Request):
                        accepted.set_result(None)
                    else:
                        self._queue.put_nowait((index, item))
        # The answer's reader must hear of any failure: a task that dies alone would leave it waiting.
        except Exception as error:
            if accepted.done():
                self._queue.put_nowait((index, error))
            else:
                accepted.set_exception(error)


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
