"""A finished run as a language model in this process: questions and weights in, steered answers out. No Ray.

>>> from mavis_dist import LLM
>>> llm = LLM.from_run("runs/quickstart")
>>> answer = llm.chat("How do I make good coffee?", weights={"positive": 0.7, "brief": 0.3})
>>> print(answer.text, answer.divergence)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
import yaml

from mavis_dist.config import Config, ConfigError, parse
from mavis_dist.decode import (
    Choice,
    Engine,
    Guide,
    PreferenceParams,
    Request,
    SamplingParams,
    Scorer,
    Update,
    chat_prompts,
)
from mavis_dist.decode.chat import longest_answer
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.models.value import load_card
from mavis_dist.sections import Serve, Steer
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import NEUTRAL_SYSTEM, UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Conversation = str | Sequence[Mapping[str, str]]  # a question, or messages with `role` and `content`

SERVE, STEER = Serve(), Steer()


class Options(TypedDict, total=False):
    """What a question may set besides its weights. Left out or None: as the HTTP service of the same run has it."""

    preferences: str | Sequence[str] | Mapping[str, float] | None  # objectives given as text, with weights if a mapping
    preference_params: PreferenceParams | None
    beta: float | None  # nats of tilt per standard deviation of reward
    tilt_cap: float | None  # nats
    scorer: Scorer | Literal["full", "lazy", "predicted", "qhead"] | None
    residual_cap: float | None  # nats, for the scorer "predicted"
    system: str | None  # system text, for conversations without one
    seed: int | None  # default: random; Answer.seed has it
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    finish_reason: str  # "stop": the model ended it; "length": it reached max_tokens
    seed: int  # repeats the answer
    choice: Choice  # tokens, and what steering did to each of them

    @property
    def divergence(self) -> float | None:
        """What steering cost: KL from the base model, summed over the answer, nats; None at temperature 0."""
        return self.choice.divergence if math.isfinite(self.choice.divergence) else None

    @property
    def values(self) -> dict[str, float]:
        """objective -> predicted reward of the finished answer, in standard deviations of the reward."""
        finite = {name: [v for v in values if math.isfinite(v)] for name, values in self.choice.values.items()}
        return {name: values[-1] for name, values in finite.items() if values}


class LLM:
    """Answers questions with a base model, steered by value models and by preferences.

    One thread at a time may use it. A stream must be read to its end, or closed, before the next question.
    """

    def __init__(
        self,
        base: BaseModel,
        guide: Guide | None = None,
        *,
        system: str = NEUTRAL_SYSTEM,
        beta: float = STEER.beta,
        tilt_cap: float | None = STEER.tilt_cap,
        residual_cap: float | None = STEER.residual_cap,
        max_tokens: int = SERVE.max_tokens,
        max_rows: int = SERVE.rows,
        trained_tokens: Mapping[str, int] = MappingProxyType({}),
    ):
        """
        Args:
            max_tokens: longest answer to a question that sets no limit of its own.
            max_rows: rows decoded at the same time: one per answer, one more for each of its preferences.
            trained_tokens: objective -> longest answer of its training, where known; values of longer ones are guesses.
        """
        self._engine = Engine(base, guide, max_rows)
        self._system, self._max_tokens = system, max_tokens
        self._steering = {"beta": beta, "tilt_cap": tilt_cap, "residual_cap": residual_cap}
        self._ids = map(str, itertools.count())
        self.trained_tokens = dict(trained_tokens)

    @classmethod
    def from_run(
        cls,
        run: str | PathLike[str],
        *,
        dtype: Literal["float32", "bfloat16"] | None = None,
        device: str | None = None,
        max_rows: int | None = None,
    ) -> LLM:
        """The base model and the published value models of a finished run, with the settings of its config.

        Args:
            run: the run's folder or fsspec URI; it may have been moved since it was written.
            dtype, device, max_rows: None: `base.dtype`, `base.device` and `serve.rows` of the run's config.

        Raises:
            UserError: this is not a finished run, or its models cannot be loaded.
        """
        config, store = open_run(run)
        dtype, device = dtype or config.base.dtype, device or config.base.device
        folders = fetch_published(store)
        if not folders:
            raise StoreError(f"{store.root} is not a finished run, it has published no value model: run it to its end")
        base = load_base(config.base.model, dtype, device)
        cards = {name: load_card(folder) for name, folder in folders.items()}
        for card in cards.values():
            card.check(base.fingerprint, base.tokenizer_fingerprint)
        return cls(
            base,
            load_guide(folders, getattr(torch, dtype), device, base),
            system=config.base.system,
            beta=config.steer.beta,
            tilt_cap=config.steer.tilt_cap,
            residual_cap=config.steer.residual_cap,
            max_tokens=config.serve.max_tokens,
            max_rows=max_rows or config.serve.rows,
            trained_tokens={name: card.max_tokens for name, card in cards.items()},
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        """What `weights` may name."""
        return self._engine.objectives

    def chat(
        self, question: Conversation, weights: Mapping[str, float] | None = None, **options: Unpack[Options]
    ) -> Answer:
        """The answer to a question or conversation.

        Args:
            weights: objective -> weight >= 0; only their proportions count. None: the base model, apart from
                preferences.

        Raises:
            UserError: naming what cannot be used, its value and the remedy.
        """
        [[answer]] = self.generate([self.request(question, weights, **options)])
        return answer

    def batch(
        self,
        questions: Sequence[Conversation],
        weights: Mapping[str, float] | None = None,
        n: int = 1,
        **options: Unpack[Options],
    ) -> list[list[Answer]]:
        """`n` independent answers to each of several questions, decoded together; otherwise as `chat`."""
        return self.generate([self.request(question, weights, n, **options) for question in questions])

    def stream(
        self, question: Conversation, weights: Mapping[str, float] | None = None, **options: Unpack[Options]
    ) -> Stream:
        """The same answer as of `chat`, piece by piece; raises the same errors, before the first piece."""
        request = self.request(question, weights, **options)
        return Stream(self._updates(request), request)

    def request(
        self, question: Conversation, weights: Mapping[str, float] | None = None, n: int = 1, **options: Unpack[Options]
    ) -> Request:
        """A question for `generate`, checked, with its seed; `n` independent answers to it. Raises UserError."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        prompt, preferences = chat_prompts(
            self._engine.tokenizer, question, _weighted(given.pop("preferences", ())), given.pop("system", self._system)
        )
        steering: dict[str, Any] = {**self._steering, "scorer": Scorer(given.pop("scorer", Scorer.LAZY))}
        names = (*self._steering, "preference_params")
        steering |= {name: given.pop(name) for name in names if name in given}
        params = SamplingParams(
            **{"max_tokens": longest_answer(prompt, preferences, self._engine.max_context, self._max_tokens)}
            | given
            | {"n": n, "stop": _texts(given.get("stop", ()))}
        )
        return self._engine.validate(
            Request(next(self._ids), prompt, weights or {}, preferences=preferences, params=params, **steering)
        )

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All answers to requests of `request`, which may differ in everything, decoded as one batch."""
        self._check_idle()
        try:
            answers = self._engine.generate(requests)
        finally:  # interrupted: the engine is free for the next call
            for request in requests:
                self._engine.cancel(request.id)
        return [
            [_answer(choice, request) for choice in choices] for request, choices in zip(requests, answers, strict=True)
        ]

    def _updates(self, request: Request) -> Iterator[Update]:
        self._check_idle()
        yield from self._engine.stream(request)

    def _check_idle(self) -> None:
        if not self._engine.is_idle:
            raise UserError("another answer is being streamed: read the stream to its end, or call its close()")


class Stream(Iterator[str]):
    """The pieces of an answer, as they are decoded."""

    def __init__(self, updates: Iterator[Update], request: Request):
        self._updates, self._request = updates, request
        self._answer: Answer | None = None

    def __next__(self) -> str:
        for update in self._updates:
            if update.finished is not None:
                self._answer = _answer(update.finished, self._request)
            if update.text:
                return update.text
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended; raises UserError before."""
        if self._answer is None:
            raise UserError("the answer is not finished: read the stream to its end first")
        return self._answer

    def close(self) -> None:
        """Stop decoding."""
        self._updates.close()  # type: ignore[attr-defined]


def _answer(choice: Choice, request: Request) -> Answer:
    """Raises RuntimeError where a model failed."""
    if choice.error is not None or choice.finish is None:
        raise RuntimeError(choice.error)
    assert request.params.seed is not None
    return Answer(choice.text, choice.finish.value, request.params.seed, choice)


def open_run(run: str | PathLike[str]) -> tuple[Config, Store]:
    """The config and the folder of a run; raises UserError."""
    place = str(run) if "://" in str(run) else str(Path(run).expanduser().resolve())
    storage, _, name = place.rstrip("/").rpartition("/")
    store = Store(storage or "/", name)
    if not store.exists(layout.CONFIG_FILE):
        raise StoreError(
            f"{place} is not a finished run, it has no {layout.CONFIG_FILE}: give the folder of a run, such as "
            "runs/quickstart after `make quickstart`"
        )
    try:
        return parse(yaml.safe_load(store.read_bytes(layout.CONFIG_FILE))), store
    except (yaml.YAMLError, ConfigError) as error:
        raise StoreError(f"{place}/{layout.CONFIG_FILE} cannot be used: {' '.join(str(error).split())}") from None


def _weighted(preferences: str | Sequence[str] | Mapping[str, float]) -> list[tuple[str, float]]:
    if isinstance(preferences, Mapping):
        return list(preferences.items())
    return [(text, 1.0) for text in _texts(preferences)]


def _texts(texts: str | Sequence[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)
