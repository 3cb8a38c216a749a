"""A running completion: n answers side by side, as one response or as events. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from mavis_dist.decode import Choice, Request
from mavis_dist.decode.request import stream_of
from mavis_dist.decode.text import StoppedText
from serve.gateway.failover import Piece
from serve.gateway.logprobs import Alignment, LogprobEntry, Speller, chat_logprobs, text_logprobs
from serve.gateway.protocol import DONE, TEXT, ApiError, Json, Shape, event, usage
from serve.gateway.requests import GenerationRequest, Preference
from serve.messages import Admission, AnswerFailed, AnswerLate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OpenAnswer(Protocol):
    """serve.gateway.streams.answer_stream with everything fixed except the request and its admission."""

    def __call__(self, request: Request, *, admission: Admission) -> AsyncGenerator[Request | Piece, None]: ...


@dataclass
class _Answer:
    """One choice while it is generated."""

    request: Request  # of one answer
    echoed: str  # what its text begins with
    text: StoppedText
    alignment: Alignment | None = None  # of tokens and text, if log-probabilities are requested
    pieces: list[str] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    num_tokens: int = 0
    last: Piece | None = None

    def add(self, piece: Piece) -> tuple[str, list[LogprobEntry]]:
        """The text that is final by now, and its tokens if log-probabilities are requested."""
        is_last = piece.finished is not None
        entries: list[LogprobEntry] = []
        if self.alignment is None:
            text = self.text.add(piece.tokens, is_last)
        else:
            text, entries = self.alignment.add(piece.tokens, piece.logprobs, is_last)
        self.pieces.append(text)
        self.entries += entries
        self.num_tokens += len(piece.tokens)
        self.last = piece
        return text, entries

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finished is not None

    @property
    def finish_reason(self) -> str:
        return self._choice.finish.value  # type: ignore[union-attr]

    def report(self, preferences: Sequence[Preference]) -> Json:
        """What steering did to this answer. Unknown values are null."""
        choice = self._choice
        num_scored = [count for count in choice.num_scored if count]  # 0 at tokens without guidance
        report: Json = {
            "divergence": self._sum(choice.divergences),
            "values": {name: _last_finite(values) for name, values in choice.values.items()},
            "candidates_per_token": sum(num_scored) / len(num_scored) if num_scored else 0.0,
        }
        if not preferences:
            return report
        steering = iter(range(len(choice.preference_weights[0])))
        return {
            **report,
            "worded_divergence": self._sum(choice.preference_divergences),
            "preferences": [
                self._preference_report(preference, next(steering) if preference.weight else None)
                for preference in preferences
            ],
        }

    def _preference_report(self, preference: Preference, k: int | None) -> Json:
        """`k` is the preference's index among those that steer; none: it does not."""
        if k is None:
            return {"text": preference.text, "final_weight": 0.0, "mean_weight": 0.0, "mean_reward": None}
        weights = [weights[k] for weights in self._choice.preference_weights]
        rewards = [rewards[k] for rewards in self._choice.preference_rewards]
        return {
            "text": preference.text,
            "final_weight": weights[-1],
            "mean_weight": None if self._is_resumed else self._choice.mean_preference_weights[k],
            "mean_reward": None if self._is_resumed else fmean(rewards),
        }

    def _sum(self, numbers: Sequence[float]) -> float | None:
        """Over the answer, if known: a base replica counts only the tokens that it generated itself."""
        total = math.fsum(numbers)
        return None if self._is_resumed or not math.isfinite(total) else total

    @property
    def _is_resumed(self) -> bool:
        assert self.last is not None
        return self.last.resumed

    @property
    def _choice(self) -> Choice:
        assert self.last is not None
        assert self.last.finished is not None
        return self.last.finished


def _last_finite(numbers: Sequence[float]) -> float | None:
    return next((number for number in reversed(numbers) if math.isfinite(number)), None)


class Completion:
    """The answers to one request, while they are generated: n to each of its prompts, in this order."""

    def __init__(
        self,
        body: GenerationRequest,
        shape: Shape,
        requests: Sequence[Request],
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        spell: Speller,
        echoed: Sequence[str] = (),
    ):
        """
        Args:
            requests: one per prompt, equal in everything else.
            echoed: per prompt, what its answers begin with; none: nothing.
        """
        self._body, self._shape, self._requests = body, shape, requests
        self._request = requests[0]
        self._tokenizer, self._spell = tokenizer, spell
        self._answers = [
            self._begin(request, index, text)
            for request, text in zip(requests, echoed or [""] * len(requests), strict=True)
            for index in range(request.params.n)
        ]
        self._failure: ApiError | None = None
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._head: Json = {
            "id": f"{shape.id_prefix}-{self._request.id}",
            "created": int(time.time()),
            "model": model,
        }

    def _begin(self, request: Request, index: int, echoed: str) -> _Answer:
        """The answer `index` to a prompt; with the same seed, that to the prompt alone."""
        one = replace(request, stream=stream_of(request, index), params=replace(request.params, n=1))
        text = StoppedText(self._tokenizer, request.params.stop, request.text_before)
        return _Answer(one, echoed, text, None if request.top_logprobs is None else Alignment(text))

    @property
    def log(self) -> Json:
        """Fields for the access log, without text of prompt or answer; null: not finished."""
        return {
            "completion": self._head["id"],
            "n": len(self._answers),
            "prompt_tokens": self._usage()["prompt_tokens"],
            "completion_tokens": self._usage()["completion_tokens"],
            "finish_reasons": [answer.finish_reason if answer.is_finished else None for answer in self._answers],
            "failure": None if self._failure is None else self._failure.code,
        }

    @property
    def _echo(self) -> Json:
        request = self._request
        echo = {
            "objective_weights": dict(request.weights),
            "beta": request.beta,
            "tilt_cap": request.tilt_cap,
            "residual_cap": request.residual_cap,
            "guide_every": request.guide_every,
            "seed": request.params.seed,
        }
        if not request.preferences:
            return echo
        weights = iter(preference.weight for preference in request.preferences)
        return {
            **echo,
            "preferences": [
                {"text": preference.text, "weight": next(weights) if preference.weight else 0.0}
                for preference in self._preferences
            ],
            "preference_params": {**asdict(request.preference_params), "c": request.preference_params.strength},
            "prompt_template": self._template,
        }

    @property
    def _preferences(self) -> Sequence[Preference]:
        return self._body.preferences or ()

    @property
    def _template(self) -> str:
        """Where preferences are put: a system turn of the model's or of a plain template, or before the text."""
        if self._shape is TEXT:
            return "none"
        return "model" if self._tokenizer.chat_template else "plain"

    async def open(self, answers: OpenAnswer, key: str = "") -> None:
        """Submit every choice as a request of its own, so that each can move to another base replica.

        The first one reserves rows for all of them, so that all are admitted, or none. Closes itself if it raises
        RequestError, Overloaded or ApiError.
        """
        indices = range(len(self._answers))
        rows = len(indices) * (1 + len(self._request.preferences))
        try:
            await self._submit(indices[:1], answers, Admission(key, rows, self._request.id))
            await self._submit(indices[1:], answers, Admission(key, 0, self._request.id))
        except AnswerFailed as error:
            self.close()
            raise ApiError(503, str(error), code="engine_unavailable") from None
        except BaseException:
            self.close()
            raise

    async def _submit(self, indices: Sequence[int], answers: OpenAnswer, admission: Admission) -> None:
        """Begin to follow some choices; returns when all of them are accepted."""
        accepted: list[asyncio.Future[None]] = []
        for index in indices:
            one = replace(self._answers[index].request, id=f"{self._request.id}-{index}")
            accepted.append(asyncio.get_running_loop().create_future())
            answer = answers(one, admission=admission)
            self._tasks.append(asyncio.create_task(self._pump(index, answer, accepted[-1])))
        await asyncio.gather(*accepted)

    def close(self) -> None:
        """Stop generating; the rows of unfinished answers become free."""
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
                **self._shape.whole(answer.echoed + "".join(answer.pieces)),
                "finish_reason": answer.finish_reason,
                "logprobs": self._logprobs(answer.entries),
                "mavis": answer.report(self._preferences),
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
            for index, answer in enumerate(self._answers):
                if answer.echoed:
                    yield self._chunk({"index": index, **self._shape.piece(answer.echoed)})
            async for index, text, entries in self._pieces():
                if text or entries:
                    logprobs = self._logprobs(entries)
                    yield self._chunk({"index": index, **self._shape.piece(text), "logprobs": logprobs})
                answer = self._answers[index]
                if answer.is_finished:
                    report = answer.report(self._preferences)
                    ending = {**self._shape.ending, "finish_reason": answer.finish_reason, "mavis": report}
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

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> Json | None:
        """None if they are not requested."""
        if self._request.top_logprobs is None:
            return None
        return (text_logprobs if self._shape is TEXT else chat_logprobs)(entries, self._spell)

    def _usage(self) -> Json:
        num_prompt = sum(len(request.prompt) for request in self._requests)
        return usage(num_prompt, sum(answer.num_tokens for answer in self._answers))

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list[LogprobEntry]]]:
        """(choice, text, its tokens) as they come, until all choices are finished; raises ApiError."""
        left = len(self._answers)
        while left:
            index, item = await self._queue.get()
            if isinstance(item, Exception):
                late = isinstance(item, AnswerLate)
                status, code = (504, "deadline_exceeded") if late else (500, "engine_error")
                self._failure = ApiError(status, str(item), code=code)
                raise self._failure
            left -= item.finished is not None
            yield index, *self._answers[index].add(item)

    async def _pump(
        self, index: int, answer: AsyncGenerator[Request | Piece, None], accepted: asyncio.Future[None]
    ) -> None:
        """Put one choice's pieces into the common queue; an error before acceptance is set on `accepted`."""
        try:
            async with aclosing(answer) as items:
                async for item in items:
                    if isinstance(item, Request):
                        accepted.set_result(None)
                    else:
                        self._queue.put_nowait((index, item))
        # Any failure must reach the answer's reader: a task that dies alone would leave it waiting.
        except Exception as error:
            if accepted.done():
                self._queue.put_nowait((index, error))
            else:
                accepted.set_exception(error)
