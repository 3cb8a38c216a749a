"""Search on top of the engine: best-of-n, and beams ranked by value (arXiv 2508.13415v2). No decode loop.

Both rank answers by their combined value, the sum over objectives of weight times V after the last token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mavis_dist.core import noise
from mavis_dist.decode.engine import Engine
from mavis_dist.decode.request import Alternative, Choice, FinishReason, Request, RequestError, Scorer
from mavis_dist.decode.text import StoppedText

Score = Callable[[Request, Choice], float]


def combined_value(request: Request, choice: Choice) -> float:
    """The weighted sum of an answer's last values, for a validated request; in standard deviations of the rewards."""
    return math.fsum(weight * choice.values[name][-1] for name, weight in request.weights.items())


def best_of(engine: Engine, requests: Sequence[Request], n: int, score: Score | None = None) -> list[Choice]:
    """The best of `n` answers to every request, all in one batch; needs an idle engine.

    Args:
        n: answers per request, instead of `params.n`.
        score: the score to rank by, given the validated request and a finished choice, such as a weighted reward. None:
            the combined value, which requires guidance at every token.

    Raises:
        RequestError: naming the field, its value and the remedy.
    """
    validated = []
    for request in requests:
        request = engine.validate(replace(request, params=replace(request.params, n=n)))
        if score is None:
            _need_values(request, "guide every token, or give a score")
        validated.append(request)
    answers = engine.generate(validated)
    return [
        _best(request, choices, score or combined_value) for request, choices in zip(validated, answers, strict=True)
    ]


def _best(request: Request, choices: Sequence[Choice], score: Score) -> Choice:
    """Failed answers cannot be ranked; one is returned only if there is no other."""
    whole = [choice for choice in choices if choice.finish in (FinishReason.STOP, FinishReason.LENGTH)]
    return max(whole, key=lambda choice: score(request, choice)) if whole else choices[0]


def beam_search(engine: Engine, requests: Sequence[Request], width: int) -> list[list[Choice]]:
    """The `width` best beams of every request, best first; the beams of all requests share the batch.

    At every step each beam draws `width` distinct tokens from its tilted distribution, and the continuations with the
    largest combined value are kept. Finished beams compete with the value after their last token. A request whose
    values are not finite gets one choice with that error. Needs an idle engine.

    Raises:
        RequestError: naming the field, its value and the remedy.
    """
    assert engine.is_idle, "beam_search() needs an engine without other requests"
    if width < 1:
        raise RequestError("width", f"is {width}; use an integer >= 1")
    twice = [name for name, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        raise RequestError("id", f"{twice[0]!r} is the id of two requests; give every request its own id")
    searches = [_Search(engine, request, width) for request in requests]  # all are validated before any starts
    origin: dict[str, tuple[_Search, int]] = {}  # request id -> search, rank of the beam

    def submit(search: _Search, first: bool = False) -> None:
        for rank, draw in search.draws():
            origin[draw.id] = (search, rank)
            engine.submit(draw, first)

    try:
        for search in searches:
            submit(search)
        while not engine.is_idle:
            for update in engine.step():
                search, rank = origin[update.request_id]
                assert update.finished is not None, "a draw is one token"
                if search.absorb(rank, update.finished):
                    submit(search, first=True)  # started searches first: their keys and values are still cached
    finally:
        for name in origin:
            engine.cancel(name)  # also frees the keys and values of the last draws
    return [search.beams for search in searches]


class _Search:
    """The beams of one request, best first. A beam draws with the noise stream of its rank."""

    def __init__(self, engine: Engine, request: Request, width: int):
        self._eos_ids, self._tokenizer, self._width = engine.eos_ids, engine.tokenizer, width
        # The lazy scorer finds the best candidate only, not the second.
        self._request = engine.validate(replace(request, scorer=Scorer.FULL))
        seed = self._request.params.seed
        assert seed is not None
        self._root = seed if request.stream is None else request.stream
        if request.params.n != 1:
            raise RequestError("n", f"is {request.params.n}; a beam search generates `width` answers: use 1")
        _need_values(self._request, "guide every token")
        self.beams = [Choice(0)]
        self._drawn: dict[int, Choice] = {}  # the draws of this step, by rank
        for _, draw in self.draws():
            engine.validate(draw)

    def draws(self) -> Iterator[tuple[int, Request]]:
        """For every unfinished beam, its rank and a request for its next token."""
        for rank, beam in enumerate(self.beams):
            if beam.finish is None:
                yield rank, self._draw(rank, beam)

    def absorb(self, rank: int, drawn: Choice) -> bool:
        """Store the draws of one beam; True when those of all beams have arrived and the next step can start."""
        self._drawn[rank] = drawn
        if len(self._drawn) < sum(beam.finish is None for beam in self.beams):
            return False
        failed = next((rank for rank, choice in self._drawn.items() if not choice.alternatives), None)
        self.beams = self._best() if failed is None else [self._failed(failed)]
        self._drawn.clear()
        return True

    def _draw(self, rank: int, beam: Choice) -> Request:
        tokens = (*self._request.answer, *beam.tokens)
        return replace(
            self._request,
            id=f"{self._request.id}/{rank}",
            answer=tokens,
            params=replace(self._request.params, max_tokens=len(tokens) + 1, stop=()),  # _finish applies them
            stream=noise.stream(self._root, "beam", rank),
            draws=self._width,
        )

    def _best(self) -> list[Choice]:
        """The best of the finished beams and of all continuations of the others."""
        pool: list[Choice] = []
        for rank, beam in enumerate(self.beams):
            if beam.finish is not None:
                pool.append(beam)
            else:
                drawn = self._drawn[rank]
                pool += [_grown(beam, a, drawn.num_scored[0]) for a in drawn.alternatives]
        pool.sort(key=lambda choice: combined_value(self._request, choice), reverse=True)  # a stable sort
        best = [replace(choice, index=index) for index, choice in enumerate(pool[: self._width])]
        for choice in best:
            if choice.finish is None:
                self._finish(choice)
        return best

    def _finish(self, beam: Choice) -> None:
        """End a beam whose last token ends the answer."""
        tokens = [*self._request.answer, *beam.tokens]
        stopped = StoppedText(self._tokenizer, self._request.params.stop, self._request.text_before)
        text = stopped.add(tokens, last=True)
        if beam.tokens[-1] in self._eos_ids or stopped.is_stopped:
            beam.finish, beam.text = FinishReason.STOP, text
        elif len(tokens) == self._request.params.max_tokens:
            beam.finish, beam.text = FinishReason.LENGTH, text

    def _failed(self, rank: int) -> Choice:
        """The failed beam, without which the others cannot be ranked."""
        drawn = self._drawn[rank]
        return replace(self.beams[rank], index=0, finish=drawn.finish, error=drawn.error, text=drawn.text)


def _grown(beam: Choice, a: Alternative, num_scored: int) -> Choice:
    return replace(
        beam,
        tokens=[*beam.tokens, a.token],
        logratios=[*beam.logratios, a.logratio],
        divergences=[*beam.divergences, a.divergence],
        values={name: [*beam.values.get(name, ()), value] for name, value in a.values.items()},
        num_scored=[*beam.num_scored, num_scored],
    )


def _need_values(request: Request, remedy: str) -> None:
    """Reject a validated request whose answers may lack a value after their last token."""
    if not request.is_guided:
        why = f"request {request.id!r} has no weight > 0, or beta is 0"
        raise RequestError("objective_weights", f"{why}: its answers have no values to rank them by; {remedy}")
    if request.guide_every != 1:
        raise RequestError("guide_every", f"is {request.guide_every}: the last token may have no value; {remedy}")
