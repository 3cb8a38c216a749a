"""Who is written when: order, room, pieces of prompts and shared first tokens. No model, no tensor."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_dist.decode.preferences import Preference
from mavis_dist.decode.request import FinishReason, Request, SamplingParams
from mavis_dist.decode.scheduler import WORTH_WAITING_FOR, Row, Scheduler

MADE_UP = 1  # the token that every row writes


class Clockwork:
    """Does to a scheduler what the engine does, and checks that what it is told can be done."""

    def __init__(self, max_rows: int = 8, cache_tokens: int | None = None, prefill_tokens: int = 8):
        self.scheduler = Scheduler(max_rows, cache_tokens)
        self.prefill_tokens = prefill_tokens
        self.encoded: dict[str, int] = {}  # tokens of new prompts, by request
        self.begun: list[str] = []  # requests in the order of their first tokens
        self.writing: set[int] = set()  # rows that have one
        self.cached: dict[int, list[int]] = {}  # tokens by row number, as a model would hold them
        self.rows: dict[int, Row] = {}
        self.rewarded: dict[str, list[int]] = {}  # answer tokens whose rewards were asked for, by request

    def submit(
        self,
        id: str,
        prompt: Iterable[int],
        max_tokens: int = 4,
        n: int = 1,
        first: bool = False,
        sentences: int = 0,
        answer: tuple[int, ...] = (),
    ) -> None:
        params, prompt = SamplingParams(max_tokens=max_tokens, seed=0, n=n), tuple(prompt)
        preferences = tuple(Preference(str(k), (50 + k, *prompt)) for k in range(sentences))
        request = Request(id, prompt, params=params, preferences=preferences, answer=answer)
        self.scheduler.submit(request, first)
        self.encoded[id], self.rewarded[id] = 0, []

    def step(self) -> list[str]:
        """One step; the requests that wrote a token, once for every row."""
        self.encode()
        written = [row.request.id for row in self.scheduler.running]
        for row in self.scheduler.running:
            self.write(row)
        self.scheduler.finish(row for row in self.scheduler.running if row.choice.finish is not None)
        return written

    def encode(self) -> None:
        self.scheduler.admit()
        self.check_room()
        budget = self.prefill_tokens
        while budget > 0 and (pieces := self.scheduler.pieces(budget)):
            for piece in pieces:
                number, tokens = piece.variant.number, piece.variant.tokens
                self.rows[number] = piece.row
                if piece.is_first:
                    assert number not in self.cached
                    self.cached[number] = self.cached[piece.source.number][: piece.start] if piece.source else []
                assert self.cached[number] == tokens[: piece.start], "a piece goes on where the cache ends"
                assert piece.end < len(tokens), "the last token's logits are asked for by the step"
                self.rewarded[piece.row.request.id] += piece.rewarded
                self.cached[number] = tokens[: piece.end]
                self.encoded[piece.row.request.id] += piece.end - piece.start
                budget -= piece.end - piece.start
            assert budget >= 0
            self.scheduler.encoded(pieces)
        for row in self.scheduler.release():
            for view in row.variants:
                self.cached.pop(view.number, None)

    def write(self, row: Row) -> None:
        if row.number not in self.writing:
            self.begun.append(row.request.id)
            self.writing.add(row.number)
        for view in row.variants:
            assert self.cached[view.number] == view.tokens[:-1]
            self.cached[view.number] = list(view.tokens)
        row.append(MADE_UP)
        if row.position == row.request.params.max_tokens:
            row.choice.finish = FinishReason.LENGTH

    def check_room(self) -> None:
        scheduler = self.scheduler
        assert scheduler.num_admitted <= scheduler.max_rows
        rows = {*scheduler.running, *scheduler._opening, *(self.rows[number] for number in self.cached)}
        if rows and scheduler.cache_tokens is not None:
            num_variants = sum(len(row.variants) for row in rows)
            assert num_variants * max(row.reserved for row in rows) <= scheduler.cache_tokens

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if self.scheduler.is_idle:
                break
            self.step()
        assert self.scheduler.is_idle
        self.encode()
        assert not self.cached


# --- order and pieces ---------------------------------------------------------------------------------------------


def test_answers_begin_in_the_order_of_arrival_and_urgent_ones_before_those_that_wait():
    """Choices of an urgent request stay in their order."""
    clock = Clockwork(max_rows=1)
    for id in "abc":
        clock.submit(id, (5, 6))
    clock.step()
    clock.submit("urgent", (7,), n=2, first=True)
    clock.submit("last", (8,))
    waiting = [(row.request.id, row.choice.index) for row in clock.scheduler._waiting]
    assert waiting == [("urgent", 0), ("urgent", 1), ("b", 0), ("c", 0), ("last", 0)]
    clock.run()
    assert clock.begun == ["a", "urgent", "urgent", "b", "c", "last"]


def test_running_answers_grow_at_every_step_while_a_long_prompt_is_encoded():
    """And the prompt gets the whole of every step's budget."""
    clock = Clockwork(prefill_tokens=8)
    clock.submit("runs", (5, 6), max_tokens=50)
    assert clock.step() == ["runs"]
    clock.submit("long", range(100, 181))
    for step in range(1, 10):
        assert clock.step() == ["runs"]
        assert clock.encoded["long"] == 8 * step
    assert clock.step() == ["runs", "long"]


def test_a_short_prompt_gets_what_a_long_one_before_it_leaves_of_a_step():
    clock = Clockwork(prefill_tokens=8)
    clock.submit("long", range(100, 112))
    clock.submit("short", (5, 6, 7))
    assert clock.step() == []
    assert clock.encoded == {"long": 8, "short": 0}
    assert clock.step() == ["long", "short"]


@pytest.mark.parametrize("prompt", [(5,), (5, 6), tuple(range(3, 90))])
def test_all_tokens_of_a_prompt_but_the_last_are_encoded(prompt):
    clock = Clockwork()
    clock.submit("r", prompt)
    clock.run()
    assert clock.encoded == {"r": len(prompt) - 1}


# --- shared first tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 20, 60])
def test_all_choices_of_a_request_encode_its_prompt_once(length):
    clock = Clockwork()
    clock.submit("r", range(100, 100 + length), n=5)
    clock.run()
    assert clock.encoded == {"r": length - 1}


def test_prompts_with_a_long_common_beginning_encode_it_once():
    stem = range(100, 100 + WORTH_WAITING_FOR)
    clock = Clockwork()
    for id, own in (("a", range(10)), ("b", range(20, 25)), ("c", range(30, 37))):
        clock.submit(id, [*stem, *own])
    clock.run()
    assert clock.encoded == {"a": len(stem) + 9, "b": 4, "c": 6}


def test_nobody_waits_for_a_short_common_beginning():
    """Two prompts that share a little are encoded in one piece each, side by side."""
    clock = Clockwork(prefill_tokens=64)
    for id in (0, 1):
        clock.submit(str(id), [*range(100, 100 + WORTH_WAITING_FOR - 1), id, id])
    assert clock.step() == ["0", "1"]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_answer_shares_with_one_that_runs_or_has_just_finished(steps):
    """Prompt and answer alike: what continues an answer encodes nothing."""
    clock = Clockwork(prefill_tokens=100)
    prompt = list(range(100, 130))
    clock.submit("whole", prompt, max_tokens=4)
    for _ in range(steps):
        clock.step()
    clock.submit("on", [*prompt, *[MADE_UP] * steps])
    clock.run()
    assert clock.encoded == {"whole": 29, "on": 0}


# --- room ---------------------------------------------------------------------------------------------------------


def test_a_head_without_room_waits_and_goes_in_as_soon_as_there_is_room():
    """Smaller ones behind it do not overtake: they could keep it out for ever."""
    clock = Clockwork(cache_tokens=40, prefill_tokens=100)
    clock.submit("small", (5, 6), max_tokens=8)
    clock.step()
    clock.submit("large", range(100, 130), max_tokens=5)
    for id in "xyz":
        clock.submit(id, (7, 8), max_tokens=2)
    while "small" in (written := clock.step()):
        assert written == ["small"]
    assert written == []  # the room of `small` is given back
    assert clock.step() == ["large"]
    clock.run()
    assert clock.begun == ["small", "large", "x", "y", "z"]


JOBS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]),
        st.tuples(st.sampled_from([0, 10, 40]), st.integers(1, 9)).map(
            lambda n: (*range(100, 100 + n[0]), *[2] * n[1])
        ),
        st.integers(1, 6),
        st.integers(1, 3),
        st.booleans(),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    jobs=JOBS, max_rows=st.integers(1, 5), cache_tokens=st.sampled_from([None, 170, 300]), prefill=st.integers(1, 20)
)
def test_any_traffic_keeps_to_its_limits_and_comes_to_an_end(jobs, max_rows, cache_tokens, prefill):
    """Room, budget and what a cache holds are checked at every step; answers that nobody hurries begin in order."""
    clock, ids = Clockwork(max_rows, cache_tokens, prefill), []
    hurried, cancelled = set(), set()
    for verb, prompt, max_tokens, n, first, sentences, written in jobs:
        if verb == "submit":
            ids.append(f"{len(ids):02}")
            sentences = min(sentences, max_rows - 1)
            answer = (MADE_UP,) * min(written, max_tokens - 1)
            clock.submit(ids[-1], prompt, max_tokens, n, first, sentences, answer)
            hurried |= {ids[-1]} if first else set()
        elif verb == "cancel" and ids:
            cancelled.add(ids[len(prompt) % len(ids)])
            clock.scheduler.cancel(ids[len(prompt) % len(ids)])
        else:
            clock.step()
    clock.run()
    assert set(ids) - set(clock.begun) <= cancelled
    if max_rows == 1:
        calm = [id for id in clock.begun if id not in hurried]
        assert calm == sorted(calm)


def test_what_sentences_say_to_a_continued_answer_is_asked_once_for_every_view():
    """However long the pieces, and though a neighbour has the same tokens in its cache already."""
    for prefill_tokens in (1, 3, 100):
        clock = Clockwork(prefill_tokens=prefill_tokens)
        clock.submit("whole", range(100, 108), max_tokens=60, sentences=2)
        while not clock.scheduler.running or clock.scheduler.running[0].position < 5:
            clock.step()
        clock.submit("rest", range(100, 108), max_tokens=9, sentences=2, answer=(MADE_UP,) * 4)
        clock.run()
        assert clock.rewarded == {"whole": [], "rest": [MADE_UP] * 4 * 3}
        assert clock.encoded["rest"] == 3 * 4  # each view's prompt is shared but for its last token


# --- cancellation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "state"), [(0, "waiting"), (1, "half encoded"), (2, "running"), (5, "finished")], ids=lambda x: str(x)
)
def test_a_request_can_be_cancelled_in_every_state(steps, state):
    """Its rows come back once, it never writes again, and one that shares with it meanwhile is none the worse."""
    clock = Clockwork(prefill_tokens=40)
    clock.submit("r", range(100, 160), max_tokens=4)
    clock.submit("sharing", [*range(100, 150), 7], max_tokens=6)
    for _ in range(steps):
        clock.step()
    assert clock.scheduler.has("r") == (state != "finished")
    assert [row.request.id for row in clock.scheduler.cancel("r")] == ["r"] * (state != "finished")
    assert clock.scheduler.cancel("r") == []
    assert not clock.scheduler.has("r")
    clock.encoded["r"] = 0
    while not clock.scheduler.is_idle:
        assert set(clock.step()) <= {"sharing"}
    clock.run()
    assert clock.encoded["r"] == 0
    assert "sharing" in clock.begun


def test_cancelling_takes_all_choices_of_one_request_and_no_other():
    clock = Clockwork(max_rows=2)
    clock.submit("a", (5, 6), n=3)
    clock.submit("b", (7, 8), n=2)
    clock.step()
    assert sorted(row.choice.index for row in clock.scheduler.cancel("a")) == [0, 1, 2]
    clock.run()
    assert clock.begun == ["a", "a", "b", "b"]
