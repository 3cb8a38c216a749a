"""Scheduling: order, limits, pieces of prompts and shared prefixes. No model, no tensor."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_dist.decode.preferences import Preference
from mavis_dist.decode.request import FinishReason, Request, SamplingParams
from mavis_dist.decode.scheduler import WORTH_WAITING_FOR, Row, Scheduler

TOKEN = 1  # the token that every row generates


class FakeEngine:
    """Drives a scheduler as the engine does, and checks that its decisions are feasible."""

    def __init__(self, max_rows: int = 8, cache_tokens: int | None = None, prefill_tokens: int = 8):
        self.scheduler = Scheduler(max_rows, cache_tokens)
        self.prefill_tokens = prefill_tokens
        self.encoded: dict[str, int] = {}  # tokens of new prompts, by request
        self.started: list[str] = []  # requests in the order of their first tokens
        self.running: set[int] = set()  # rows that have a first token
        self.cached: dict[int, list[int]] = {}  # tokens by row number, as a model would hold them
        self.rows: dict[int, Row] = {}
        self.rewarded: dict[str, list[int]] = {}  # answer tokens whose rewards were requested, by request

    def submit(
        self,
        id: str,
        prompt: Iterable[int],
        max_tokens: int = 4,
        n: int = 1,
        first: bool = False,
        num_preferences: int = 0,
        answer: tuple[int, ...] = (),
    ) -> None:
        params, prompt = SamplingParams(max_tokens=max_tokens, seed=0, n=n), tuple(prompt)
        preferences = tuple(Preference(str(k), (50 + k, *prompt)) for k in range(num_preferences))
        request = Request(id, prompt, params=params, preferences=preferences, answer=answer)
        self.scheduler.submit(request, first)
        self.encoded[id], self.rewarded[id] = 0, []

    def step(self) -> list[str]:
        """One step; the requests that generated a token, once per row."""
        self.encode()
        generated = [row.request.id for row in self.scheduler.running]
        for row in self.scheduler.running:
            self.generate(row)
        self.scheduler.finish(row for row in self.scheduler.running if row.choice.finish is not None)
        return generated

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
                assert self.cached[number] == tokens[: piece.start], "a piece continues where the cache ends"
                assert piece.end < len(tokens), "the step computes the last token's logits"
                self.rewarded[piece.row.request.id] += piece.rewarded
                self.cached[number] = tokens[: piece.end]
                self.encoded[piece.row.request.id] += piece.end - piece.start
                budget -= piece.end - piece.start
            assert budget >= 0
            self.scheduler.encoded(pieces)
        for row in self.scheduler.release():
            for variant in row.variants:
                self.cached.pop(variant.number, None)

    def generate(self, row: Row) -> None:
        if row.number not in self.running:
            self.started.append(row.request.id)
            self.running.add(row.number)
        for variant in row.variants:
            assert self.cached[variant.number] == variant.tokens[:-1]
            self.cached[variant.number] = list(variant.tokens)
        row.append(TOKEN)
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


def test_answers_start_in_order_of_arrival_and_urgent_ones_before_waiting_ones():
    """Choices of an urgent request keep their order."""
    engine = FakeEngine(max_rows=1)
    for id in "abc":
        engine.submit(id, (5, 6))
    engine.step()
    engine.submit("urgent", (7,), n=2, first=True)
    engine.submit("last", (8,))
    waiting = [(row.request.id, row.choice.index) for row in engine.scheduler._waiting]
    assert waiting == [("urgent", 0), ("urgent", 1), ("b", 0), ("c", 0), ("last", 0)]
    engine.run()
    assert engine.started == ["a", "urgent", "urgent", "b", "c", "last"]


def test_running_answers_grow_at_every_step_while_a_long_prompt_is_encoded():
    """And the prompt gets the full budget of every step."""
    engine = FakeEngine(prefill_tokens=8)
    engine.submit("runs", (5, 6), max_tokens=50)
    assert engine.step() == ["runs"]
    engine.submit("long", range(100, 181))
    for step in range(1, 10):
        assert engine.step() == ["runs"]
        assert engine.encoded["long"] == 8 * step
    assert engine.step() == ["runs", "long"]


def test_a_short_prompt_gets_the_budget_that_a_long_one_before_it_leaves():
    engine = FakeEngine(prefill_tokens=8)
    engine.submit("long", range(100, 112))
    engine.submit("short", (5, 6, 7))
    assert engine.step() == []
    assert engine.encoded == {"long": 8, "short": 0}
    assert engine.step() == ["long", "short"]


@pytest.mark.parametrize("prompt", [(5,), (5, 6), tuple(range(3, 90))])
def test_all_tokens_of_a_prompt_except_the_last_are_encoded(prompt):
    engine = FakeEngine()
    engine.submit("r", prompt)
    engine.run()
    assert engine.encoded == {"r": len(prompt) - 1}


# --- shared prefixes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 20, 60])
def test_all_choices_of_a_request_encode_its_prompt_once(length):
    engine = FakeEngine()
    engine.submit("r", range(100, 100 + length), n=5)
    engine.run()
    assert engine.encoded == {"r": length - 1}


def test_prompts_with_a_long_common_prefix_encode_it_once():
    stem = range(100, 100 + WORTH_WAITING_FOR)
    engine = FakeEngine()
    for id, own in (("a", range(10)), ("b", range(20, 25)), ("c", range(30, 37))):
        engine.submit(id, [*stem, *own])
    engine.run()
    assert engine.encoded == {"a": len(stem) + 9, "b": 4, "c": 6}


def test_no_row_waits_for_a_short_common_prefix():
    """Two prompts with a short common prefix are encoded in one piece each, in the same step."""
    engine = FakeEngine(prefill_tokens=64)
    for id in (0, 1):
        engine.submit(str(id), [*range(100, 100 + WORTH_WAITING_FOR - 1), id, id])
    assert engine.step() == ["0", "1"]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_answer_shares_tokens_with_a_running_or_just_finished_one(steps):
    """Prompt and answer alike: the continuation of an answer encodes nothing."""
    engine = FakeEngine(prefill_tokens=100)
    prompt = list(range(100, 130))
    engine.submit("whole", prompt, max_tokens=4)
    for _ in range(steps):
        engine.step()
    engine.submit("on", [*prompt, *[TOKEN] * steps])
    engine.run()
    assert engine.encoded == {"whole": 29, "on": 0}


# --- limits -------------------------------------------------------------------------------------------------------


def test_a_large_row_at_the_head_of_the_queue_is_not_overtaken():
    """Smaller rows behind it could delay it for ever."""
    engine = FakeEngine(cache_tokens=40, prefill_tokens=100)
    engine.submit("small", (5, 6), max_tokens=8)
    engine.step()
    engine.submit("large", range(100, 130), max_tokens=5)
    for id in "xyz":
        engine.submit(id, (7, 8), max_tokens=2)
    while "small" in (generated := engine.step()):
        assert generated == ["small"]
    assert generated == []  # the cache of `small` is freed
    assert engine.step() == ["large"]
    engine.run()
    assert engine.started == ["small", "large", "x", "y", "z"]


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
def test_any_traffic_respects_the_limits_and_finishes(jobs, max_rows, cache_tokens, prefill):
    """Limits, budget and cache contents are checked at every step; answers without priority start in order."""
    engine, ids = FakeEngine(max_rows, cache_tokens, prefill), []
    urgent, cancelled = set(), set()
    for verb, prompt, max_tokens, n, first, num_preferences, generated in jobs:
        if verb == "submit":
            ids.append(f"{len(ids):02}")
            num_preferences = min(num_preferences, max_rows - 1)
            answer = (TOKEN,) * min(generated, max_tokens - 1)
            engine.submit(ids[-1], prompt, max_tokens, n, first, num_preferences, answer)
            urgent |= {ids[-1]} if first else set()
        elif verb == "cancel" and ids:
            cancelled.add(ids[len(prompt) % len(ids)])
            engine.scheduler.cancel(ids[len(prompt) % len(ids)])
        else:
            engine.step()
    engine.run()
    assert set(ids) - set(engine.started) <= cancelled
    if max_rows == 1:
        others = [id for id in engine.started if id not in urgent]
        assert others == sorted(others)


def test_rewards_of_a_continued_answer_are_computed_once_per_variant():
    """For pieces of any length, and even if a neighbour has the same tokens in its cache."""
    for prefill_tokens in (1, 3, 100):
        engine = FakeEngine(prefill_tokens=prefill_tokens)
        engine.submit("whole", range(100, 108), max_tokens=60, num_preferences=2)
        while not engine.scheduler.running or engine.scheduler.running[0].position < 5:
            engine.step()
        engine.submit("rest", range(100, 108), max_tokens=9, num_preferences=2, answer=(TOKEN,) * 4)
        engine.run()
        assert engine.rewarded == {"whole": [], "rest": [TOKEN] * 4 * 3}
        assert engine.encoded["rest"] == 3 * 4  # each variant's prompt is shared, except its last token


# --- cancellation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "state"), [(0, "waiting"), (1, "half encoded"), (2, "running"), (5, "finished")], ids=lambda x: str(x)
)
def test_a_request_can_be_cancelled_in_every_state(steps, state):
    """Its rows are returned once, it generates no more tokens, and a request that shares with it is unaffected."""
    engine = FakeEngine(prefill_tokens=40)
    engine.submit("r", range(100, 160), max_tokens=4)
    engine.submit("sharing", [*range(100, 150), 7], max_tokens=6)
    for _ in range(steps):
        engine.step()
    assert engine.scheduler.has("r") == (state != "finished")
    assert [row.request.id for row in engine.scheduler.cancel("r")] == ["r"] * (state != "finished")
    assert engine.scheduler.cancel("r") == []
    assert not engine.scheduler.has("r")
    engine.encoded["r"] = 0
    while not engine.scheduler.is_idle:
        assert set(engine.step()) <= {"sharing"}
    engine.run()
    assert engine.encoded["r"] == 0
    assert "sharing" in engine.started


def test_cancelling_affects_all_choices_of_one_request_only():
    engine = FakeEngine(max_rows=2)
    engine.submit("a", (5, 6), n=3)
    engine.submit("b", (7, 8), n=2)
    engine.step()
    assert sorted(row.choice.index for row in engine.scheduler.cancel("a")) == [0, 1, 2]
    engine.run()
    assert engine.started == ["a", "a", "b", "b"]
