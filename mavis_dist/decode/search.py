"""Search on top of the engine: best-of-n, and beams that are ranked by value (arXiv 2508.13415v2). No decode loop.

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
    """What a prepared request's objectives, in its own proportions, expect of an answer; in sd of their rewards."""
    return math.fsum(weight * choice.values[name][-1] for name, weight in request.weights.items())


def best_of(engine: Engine, requests: Sequence[Request], n: int, score: Score | None = None) -> list[Choice]:
    """The best of `n` answers to every request, all in one batch; needs an idle engine.

    Args:
        n: answers per request, in place of `params.n`.
        score: what to rank them by, given the prepared request and a finished choice, such as a weighted reward. None:
            their combined value, which needs guidance of every token.

    Raises:
        RequestError: naming the field, its value and the remedy.
    """
    prepared = []
    for request in requests:
        request = engine.validate(replace(request, params=replace(request.params, n=n)))
        if score is None:
            _need_values(request, "guide every token, or give a score")
        prepared.append(request)
    answers = engine.generate(prepared)
    return [
        _best(request, choices, score or combined_value) for request, choices in zip(prepared, answers, strict=True)
    ]


def _best(request: Request, choices: Sequence[Choice], score: Score) -> Choice:
    """A failed answer has nothing to be ranked by; it is returned where there is no other."""
    whole = [choice for choice in choices if choice.finish in (FinishReason.STOP, FinishReason.LENGTH)]
    return max(whole, key=lambda choice: score(request, choice)) if whole else choices[0]


def beam_search(engine: Engine, requests: Sequence[Request], width: int) -> list[list[Choice]]:
    """The `width` best beams of every request, best first; the beams of all requests share the batch.

    At every step each beam draws `width` distinct tokens from its tilted law, and of all continuations those with the
    largest combined value go on. A finished beam stays in the running with the value after its last token. A request
    whose values are not finite gets one choice, which says so. Needs an idle engine.

    Raises:
        RequestError: naming the field, its value and the remedy.
    """
    assert engine.is_idle, "beam_search() needs an engine without other requests"
    if width < 1:
        raise RequestError("width", f"is {width}; use an integer >= 1")
    twice = [name for name, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        raise RequestError("id", f"{twice[0]!r} is the id of two requests; give every request an id of its own")
    searches = [_Search(engine, request, width) for request in requests]  # all are refused before any is begun
    origin: dict[str, tuple[_Search, int]] = {}  # request id -> search, place of the beam

    def submit(search: _Search, first: bool = False) -> None:
        for place, draw in search.draws():
            origin[draw.id] = (search, place)
            engine.submit(draw, first)

    try:
        for search in searches:
            submit(search)
        while not engine.is_idle:
            for update in engine.step():
                search, place = origin[update.request_id]
                assert update.finished is not None, "a draw is one token"
                if search.absorb(place, update.finished):
                    submit(search, first=True)  # begun searches before new ones: they find their keys and values
    finally:
        for name in origin:
            engine.cancel(name)  # also frees what the last draws were kept for
    return [search.beams for search in searches]


class _Search:
    """The beams of one request, best first. A beam draws with the noise stream of its place among them."""

    def __init__(self, engine: Engine, request: Request, width: int):
        self._eos_ids, self._tokenizer, self._width = engine.eos_ids, engine.tokenizer, width
        # The lazy scorer knows the best candidate, not the second.
        self._request = engine.validate(replace(request, scorer=Scorer.FULL))
        seed = self._request.params.seed
        assert seed is not None
        self._root = seed if request.stream is None else request.stream
        if request.params.n != 1:
            raise RequestError("n", f"is {request.params.n}; a beam search writes `width` answers: use 1")
        _need_values(self._request, "guide every token")
        self.beams = [Choice(0)]
        self._drawn: dict[int, Choice] = {}  # what came back of this step, by place
        for _, draw in self.draws():
            engine.validate(draw)

    def draws(self) -> Iterator[tuple[int, Request]]:
        """For every beam that goes on, its place and a request for its next token."""
        for place, beam in enumerate(self.beams):
            if beam.finish is None:
                yield place, self._draw(place, beam)

    def absorb(self, place: int, drawn: Choice) -> bool:
        """Take note of the draws of one beam; True when those of all beams are there and the next step can begin."""
        self._drawn[place] = drawn
        if len(self._drawn) < sum(beam.finish is None for beam in self.beams):
            return False
        failed = next((place for place, choice in self._drawn.items() if not choice.alternatives), None)
        self.beams = self._best() if failed is None else [self._failed(failed)]
        self._drawn.clear()
        return True

    def _draw(self, place: int, beam: Choice) -> Request:
        written = (*self._request.answer, *beam.tokens)
        return replace(
            self._request,
            id=f"{self._request.id}/{place}",
            answer=written,
            params=replace(self._request.params, max_tokens=len(written) + 1, stop=()),  # ends are decided in _finish
            stream=noise.stream(self._root, "beam", place),
            draws=self._width,
        )

    def _best(self) -> list[Choice]:
        """The best of the finished beams and of all continuations of the others."""
        pool: list[Choice] = []
        for place, beam in enumerate(self.beams):
            if beam.finish is not None:
                pool.append(beam)
            else:
                drawn = self._drawn[place]
                pool += [_grown(beam, a, drawn.num_scored[0]) for a in drawn.alternatives]
        pool.sort(key=lambda choice: combined_value(self._request, choice), reverse=True)  # equals keep their order
        best = [replace(choice, index=index) for index, choice in enumerate(pool[: self._width])]
        for choice in best:
            if choice.finish is None:
                self._finish(choice)
        return best

    def _finish(self, beam: Choice) -> None:
        """End a beam whose last token ends the answer."""
        written = [*self._request.answer, *beam.tokens]
        stopped = StoppedText(self._tokenizer, self._request.params.stop)
        text = stopped.add(written, last=True)
        if beam.tokens[-1] in self._eos_ids or stopped.is_stopped:
            beam.finish, beam.text = FinishReason.STOP, text
        elif len(written) == self._request.params.max_tokens:
            beam.finish, beam.text = FinishReason.LENGTH, text

    def _failed(self, place: int) -> Choice:
        """The beam that the others cannot be ranked against."""
        drawn = self._drawn[place]
        return replace(self.beams[place], index=0, finish=drawn.finish, error=drawn.error, text=drawn.text)


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
    """Refuse a prepared request whose answers are not sure to have a value after their last token."""
    if not request.is_guided:
        why = f"request {request.id!r} has no weight > 0, or beta is 0"
        raise RequestError("objective_weights", f"{why}: its answers have no values to rank them by; {remedy}")
    if request.guide_every != 1:
        raise RequestError("guide_every", f"is {request.guide_every}: the last token may have no value; {remedy}")
