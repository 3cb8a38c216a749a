"""Admission, turns and refusals: properties of the queue under arbitrary arrivals and departures."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.base.fair_queue import RESERVED_S, FairQueue
from serve.gateway.refusals import Overloaded, Refusals
from serve.messages import Admission

LIMIT, MOST = 24, 6
Keys = st.sampled_from("abc")
Rows = st.integers(1, MOST)
Comes = st.tuples(st.just("comes"), Keys, Rows)
Event = st.one_of(Comes, Comes, st.tuples(st.just("turn")), st.tuples(st.just("leaves"), st.integers(0, 60)))


class Model:
    """A line, and what is known about it from outside."""

    def __init__(self):
        self.queue: FairQueue[str] = FairQueue(LIMIT)
        self.waiting: dict[str, tuple[str, int]] = {}  # id -> key, rows; in the order of arrival
        self.handed: list[tuple[str, str, int]] = []
        self.ids = count()

    def comes(self, key: str, rows: int) -> bool:
        is_let_in = self.queue.has_room(key, rows)
        if is_let_in:
            self.joins(key, rows)
        return is_let_in

    def joins(self, key: str, rows: int) -> None:
        id = str(next(self.ids))
        self.queue.add(key, id, rows, id)
        self.waiting[id] = (key, rows)

    def turn(self) -> None:
        id = self.queue.head()
        assert (id is None) == (not self.waiting)
        if id is not None:
            self.queue.pop()
            self.handed.append((id, *self.waiting.pop(id)))

    def leaves(self, number: int) -> None:
        id = list(self.waiting)[number % len(self.waiting)] if self.waiting else "nobody"
        assert self.queue.remove(id) == (id in self.waiting)
        self.waiting.pop(id, None)

    def waited(self) -> Counter[str]:
        rows: Counter[str] = Counter()
        for key, number in self.waiting.values():
            rows[key] += number
        return rows


@settings(deadline=None)  # the cores may be busy with other tests
@given(st.lists(Event, max_size=60))
def test_rows_are_counted_exactly_and_none_is_lost(events):
    model = Model()
    for name, *args in events:
        before = model.waited()
        result = getattr(model, name)(*args)
        if name == "comes":
            key, rows = args
            free = LIMIT - before.total()
            assert result == (not before or before[key] + rows <= free)
        assert model.queue.rows == model.waited().total() <= LIMIT
    while model.waiting:
        model.turn()
    assert model.queue.rows == 0
    assert model.queue.head() is None


@settings(deadline=None)  # the cores may be busy with other tests
@given(st.lists(Event, max_size=60), st.integers(1, 5))
def test_no_key_gets_ahead_of_a_waiting_one_by_more_than_a_request(events, num_waiting):
    model = Model()
    for name, *args in events:
        getattr(model, name)(*args)
    for _ in range(num_waiting):
        model.joins("patient", 1)
    seen = len(model.handed)
    while "patient" in model.waited():
        got: Counter[str] = Counter()
        for _, key, rows in model.handed[seen:]:
            got[key] += rows
        assert all(rows <= got["patient"] + MOST for rows in got.values())
        model.comes("a", MOST)
        model.turn()


@settings(deadline=None)  # the cores may be busy with other tests
@given(st.lists(Event, max_size=60))
def test_requests_of_one_key_keep_their_order(events):
    model, come = Model(), []
    for name, *args in events:
        known = set(model.waiting)
        getattr(model, name)(*args)
        come += [id for id in model.waiting if id not in known]
    for key in "abc":
        order = [id for id, of, _ in model.handed if of == key]
        assert order == [id for id in come if id in order]


def test_one_key_gets_half_of_the_queue_and_leaves_room_for_the_next():
    model = Model()
    assert [model.comes("a", 1) for _ in range(100)].count(True) == LIMIT // 2
    assert [model.comes("b", 1) for _ in range(100)].count(True) == LIMIT // 4
    assert model.comes("c", 3)


def test_an_empty_queue_admits_any_request_and_then_is_full():
    model = Model()
    assert model.comes("a", 10 * LIMIT)
    assert not model.comes("b", 1)


def test_rows_are_reserved_for_following_requests_for_a_limited_time():
    now = [0.0]
    queue: FairQueue[str] = FairQueue(18, lambda: now[0])
    queue.add("other", "0", 1, "0")
    assert queue.admits(Admission("a", rows=8, group="g"), 2)
    queue.add("a", "1", 2, "1")
    # 1 + 2 wait and 6 are kept: what "a" has is more than what would be left.
    assert not queue.admits(Admission("a"), 2)
    assert not queue.admits(Admission("b"), 12)
    assert queue.admits(Admission("a", rows=0, group="g"), 2)
    queue.add("a", "2", 2, "2")
    assert not queue.admits(Admission("a"), 2)
    assert queue.admits(Admission("a"), 1)  # counted once, not both as kept and as waiting
    now[0] = RESERVED_S
    assert queue.admits(Admission("a"), 2)  # the others went elsewhere


def test_resumed_requests_go_first_in_their_order():
    queue: FairQueue[str] = FairQueue(LIMIT)
    for key, id in [("a", "1"), (None, "2"), ("b", "3"), (None, "4")]:
        queue.add(key, id, 2, id)
    order = []
    while (head := queue.head()) is not None:
        order.append(head)
        queue.pop()
    assert order == ["2", "4", "1", "3"]


def attempt(refusals: Refusals, key: str, rows: int, wait_s: float | None) -> str:
    try:
        with refusals.remembered(key, rows):
            if wait_s is not None:
                raise Overloaded(wait_s)
    except Overloaded as error:
        return f"{error.wait_s:g}"
    return "in"


def test_a_refusal_is_remembered_for_a_moment_for_its_key_and_its_rows():
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    assert attempt(refusals, "a", 3, 1.0) == "1"
    now[0] = 0.1
    # Nobody is asked: None would have let them in.
    assert [attempt(refusals, "a", rows, None) for rows in (3, 4)] == ["0.9", "0.9"]
    assert [attempt(refusals, key, rows, None) for key, rows in (("a", 2), ("b", 3))] == ["in", "in"]
    now[0] = 0.13  # an eighth of the wait has passed
    assert attempt(refusals, "a", 3, None) == "in"


@pytest.mark.parametrize("wait_s", [0.0, 60.0])
def test_a_refusal_is_never_remembered_for_long(wait_s):
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    attempt(refusals, "a", 1, wait_s)
    now[0] = 0.26 if wait_s else 0.0
    assert attempt(refusals, "a", 1, None) == "in"
