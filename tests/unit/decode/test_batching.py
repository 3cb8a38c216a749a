"""Any traffic through one engine: every answer is the one that its request gets alone.

Neighbours, slots, shared prefixes, pieces of prompts, cancellations and the order of arrival do not change any token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mavis_dist.decode import Choice, Engine, FinishReason, LocalGuide, Request, SamplingParams, Scorer, Update
from mavis_dist.decode.request import stream_of
from mavis_dist.decode.trunks import Predictor
from mavis_dist.models import kv
from mavis_dist.models.load import BaseModel
from mavis_dist.models.qhead import Student
from mavis_dist.models.value import ValueModel
from mavis_dist.native import build
from tests.fakes import VOCAB, tiny_base, tiny_student, tiny_value
from tests.machines import MACHINE


@dataclass(frozen=True, eq=False)
class World:
    """The models of an engine."""

    base: BaseModel
    models: dict[str, ValueModel]
    students: dict[str, tuple[Student, int]]
    alone: dict[str, list[Choice]] = field(default_factory=dict)  # what requests get from an engine of their own

    def engine(self, **limits) -> tuple[Engine, LocalGuide]:
        guide = LocalGuide(self.models, self.students)
        return Engine(self.base, guide, **limits), guide


def world(head_size: int, dtype: torch.dtype) -> World:
    base = tiny_base(seed=0, eos_boost=1.0, head_size=head_size)
    base.model.to(dtype)
    models = {"brief": tiny_value(1, layers=2, head_size=head_size), "kind": tiny_value(2, head_size=head_size)}
    student = tiny_student(3, num_objectives=2, head_size=head_size)
    for model in (*models.values(), student.model):
        model.to_precision(dtype)
    return World(base, models, {"kind": (student, 0), "brief": (student, 1)})


SINGLE, HALF = world(8, torch.float32), world(64, torch.bfloat16)
BASE = SINGLE.base
SCORERS = [(Scorer.FULL, None), (Scorer.FULL, 0.8), (Scorer.LAZY, 0.8), (Scorer.LAZY, 2.5)]
SCORERS += [(Scorer.QHEAD, None), (Scorer.QHEAD, 0.8), (Scorer.PREDICTED, None), (Scorer.PREDICTED, 0.8)]
STEM = tuple(range(10, 60))  # what prompts share
STEPS_TO_IDLE = 1000  # more than any of these queues needs

# Hypothesis prefers small numbers, but small requests rarely fail: it only draws the seed of a plain generator.
CHANCES = st.integers(0, 2**32 - 1).map(random.Random)


def any_request(chance: random.Random) -> Request:
    """Any prompt, weights, scorer, filters, number of choices and stop strings."""
    pick = chance.choice
    scorer, tilt_cap = pick(SCORERS)
    return Request(
        id="",
        prompt=(1, *STEM[: pick([0, 3, 33, 50])], *chance.choices(range(3, VOCAB), k=pick([0, 1, 4, 12]))),
        weights=pick([{}, {"brief": 1.0}, {"kind": 1.0, "brief": 0.0}, {"kind": 0.7, "brief": 1.3}]),
        beta=pick([0.0, 3.0, 8.0]),
        tilt_cap=tilt_cap,
        scorer=scorer,
        residual_cap=pick([0.5, 1.0, None]),
        guide_every=pick([1, 1, 2, 3]),
        params=SamplingParams(
            max_tokens=pick([1, 4, 7, 12]),
            temperature=pick([0.0, 0.7, 1.0, 1.5]),
            top_k=pick([1, 5, 40, VOCAB]),
            top_p=pick([1.0, 0.8]),
            min_p=pick([0.0, 0.02]),
            seed=chance.randrange(1000),
            n=pick([1, 1, 2, 3]),
            stop=pick([(), (), ("a",), ("G", "7m"), tuple("bdfhjlnprtvxz|")]),
        ),
    )


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    """The cache outgrows its slots and cells repeatedly."""
    monkeypatch.setattr(kv, "CELLS_PER_GROWTH", 4)
    monkeypatch.setattr(kv, "SLOTS_PER_GROWTH", 1)


def alone(world: World, request: Request) -> list[Choice]:
    """What a request gets from an engine of its own, one answer at a time."""
    key = repr(replace(request, id=""))
    if key not in world.alone:
        engine, _ = world.engine(max_rows=1, use_hf_forward=world is SINGLE)
        [world.alone[key]] = engine.generate([request])
    return world.alone[key]


def assert_is(choice: Choice, whole: Choice, start: int) -> None:
    """A choice is the rest of a whole answer; numbers up to rounding, which depends on the shape of the batch."""
    assert (choice.finish, choice.error) == (whole.finish, None)
    assert (choice.tokens, choice.text) == (whole.tokens[start:], whole.text)
    np.testing.assert_allclose(choice.logratios, whole.logratios[start:], atol=1e-4)
    np.testing.assert_allclose(choice.divergences, whole.divergences[start:], atol=1e-3)
    assert choice.values.keys() == whole.values.keys()
    for name, values in choice.values.items():
        np.testing.assert_allclose(values, whole.values[name][start:], atol=1e-4)
    assert choice.num_scored == whole.num_scored[start:]


def assert_holds_nothing(engine: Engine, guide: LocalGuide) -> None:
    """An idle engine has no rows, no cache, and nothing that grows with the requests it has served."""
    assert engine.is_idle
    assert engine.load == (0, 0)
    scheduler = engine._scheduler
    assert not any((scheduler.running, scheduler._waiting, scheduler._opening, scheduler._finished))
    assert not any((engine._opened, engine._unseen, engine._batch))
    assert not any(trunk.known for trunk in guide._trunks if isinstance(trunk, Predictor))
    for slots in (engine._base, *(trunk.slots for trunk in guide._trunks)):
        assert not any((slots._slot_of, slots._rows, slots._lengths, slots._branched))
        assert (slots._num_slots, slots._num_cells) == (0, 0)
        assert slots._decoder.cache.is_empty


class Traffic:
    """An engine with its requests; checks every answer when it ends."""

    def __init__(self, world: World = SINGLE, **limits):
        self.world = world
        self.engine, self.guide = world.engine(**limits)
        self.requests: dict[str, Request] = {}
        self.whole: dict[str, tuple[list[Choice], int]] = {}  # by request: its choices, and its start in them
        self.written: dict[tuple[str, int], list[int]] = {}  # by answer
        self.open: set[tuple[str, int]] = set()

    def submit(self, request: Request, first: bool = False) -> None:
        self._submit(request, first, alone(self.world, request), 0)

    def fork(self, request_id: str, index: int, cut: int, first: bool = False) -> None:
        """Continue an answer from its first `cut` tokens that this engine generated."""
        request = self.requests[request_id]
        choices, start = self.whole[request_id]
        answer = (*request.answer, *self.written[request_id, index][:cut])
        params = replace(request.params, n=1)
        rest = replace(request, answer=answer, params=params, stream=stream_of(request, index))
        self._submit(rest, first, [choices[index]], start + cut)

    def longest_fork(self, request_id: str, index: int) -> int:
        """Number of tokens of an answer so far, without the last one of a whole answer."""
        choices, start = self.whole[request_id]
        return min(len(self.written[request_id, index]), len(choices[index].tokens) - start - 1)

    def step(self) -> None:
        self._absorb(self.engine.step())
        assert self.engine.load[0] <= self.engine._scheduler.max_rows

    def cancel(self, request_id: str) -> None:
        updates = self.engine.cancel(request_id)
        assert {(u.request_id, u.index) for u in updates} == {key for key in self.open if key[0] == request_id}
        self._absorb(updates, FinishReason.ABORT)

    def finish(self) -> None:
        """All requests are answered, and no state remains."""
        for _ in range(STEPS_TO_IDLE):
            if self.engine.is_idle:
                break
            self.step()
        assert not self.open
        assert_holds_nothing(self.engine, self.guide)

    def _submit(self, request: Request, first: bool, choices: list[Choice], start: int) -> None:
        request = self.engine.submit(replace(request, id=f"r{len(self.requests)}"), first)
        self.requests[request.id], self.whole[request.id] = request, (choices, start)
        for index in range(request.params.n):
            self.written[request.id, index] = []
            self.open.add((request.id, index))

    def _absorb(self, updates: list[Update], finish: FinishReason | None = None) -> None:
        for update in updates:
            key = update.request_id, update.index
            assert key in self.open
            choices, start = self.whole[update.request_id]
            whole, written = choices[update.index], self.written[key]
            assert update.start == len(self.requests[update.request_id].answer) + len(written)
            written += update.tokens
            assert written == whole.tokens[start : start + len(written)]
            if update.finished is None:
                continue
            self.open.remove(key)
            assert update.finished.tokens == written
            if finish is FinishReason.ABORT:
                assert (update.finished.finish, len(update.finished.logratios)) == (finish, len(written))
            else:
                assert_is(update.finished, whole, start)


class TrafficMachine(RuleBasedStateMachine):
    """Requests arrive, are forked, cancelled and finished in any order, in engines of any size."""

    world = SINGLE

    @initialize(
        max_rows=st.integers(1, 6),
        prefill_tokens=st.integers(1, 8),
        cache_tokens=st.sampled_from([None, 80, 160]),
        use_hf_forward=st.booleans(),
    )
    def start(self, use_hf_forward, **limits):
        self.traffic = Traffic(self.world, use_hf_forward=use_hf_forward and self.world is SINGLE, **limits)

    @rule(chance=CHANCES)
    def submit(self, chance):
        self.traffic.submit(any_request(chance), first=chance.random() < 0.3)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.traffic.step()

    @precondition(lambda self: any(self.traffic.written.values()))
    @rule(chance=CHANCES)
    def fork(self, chance):
        """Continue running, finished or cancelled answers, mostly from their newest token."""
        written = [key for key, tokens in self.traffic.written.items() if tokens]
        for key in chance.choices(written, k=3):
            longest = self.traffic.longest_fork(*key)
            self.traffic.fork(*key, chance.choice([longest, longest, longest // 2]), first=chance.random() < 0.3)

    @precondition(lambda self: len(self.traffic.open) > 2)
    @rule(chance=CHANCES)
    def cancel(self, chance):
        self.traffic.cancel(chance.choice(sorted(self.traffic.open))[0])

    def teardown(self):
        if hasattr(self, "traffic"):
            self.traffic.finish()


class HalfPrecisionMachine(TrafficMachine):
    """Bfloat16 rounds coarsely: any sum whose order depends on a neighbour changes tokens."""

    world = HALF


SETTINGS = settings(
    MACHINE,
    max_examples=30,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TrafficMachine.TestCase.settings = HalfPrecisionMachine.TestCase.settings = SETTINGS
TestAnyTraffic = TrafficMachine.TestCase
TestAnyTrafficInHalfPrecision = pytest.mark.skipif(not build.is_loaded(), reason="needs the native forward pass")(
    HalfPrecisionMachine.TestCase
)


@pytest.mark.skipif(not build.is_loaded(), reason="needs the native forward pass")
def test_half_precision_is_tested_natively():
    engine, guide = HALF.engine()
    assert engine.is_batch_invariant
    assert guide.is_batch_invariant


@pytest.mark.parametrize("prefill_tokens", [1, 5, 16])
def test_a_step_encodes_at_most_its_budget_of_prompt_tokens(prefill_tokens, monkeypatch):
    """All tokens of all prompts except the last ones, a limited number per step."""
    engine, encoded = Engine(BASE, max_rows=4, prefill_tokens=prefill_tokens), []
    extend = engine._base.extend

    def counted(rows, tokens, num_read=None):
        if num_read is not None:
            encoded.append(sum(map(len, tokens)))
        return extend(rows, tokens, num_read)

    monkeypatch.setattr(engine._base, "extend", counted)
    prompts = [tuple(range(10 * i, 11 * i + 20)) for i in range(1, 4)]  # of different lengths, nothing in common
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, params=SamplingParams(max_tokens=5, seed=0)))
    total = 0
    while not engine.is_idle:
        engine.step()
        assert sum(encoded) <= prefill_tokens
        total, encoded[:] = total + sum(encoded), []
    assert total == sum(len(prompt) - 1 for prompt in prompts)


def some_request(chance: random.Random) -> Request:
    return Request(
        "",
        (1, *STEM[: chance.choice([0, 40])], *chance.choices([5, 6, 7], k=chance.randint(0, 3))),
        chance.choice([{}, {"brief": 1.0}, {"brief": 0.5, "kind": 0.5}]),
        tilt_cap=1.0,
        scorer=chance.choice(list(Scorer)),
        params=SamplingParams(max_tokens=chance.randint(1, 8), seed=chance.randint(0, 3), n=chance.randint(1, 2)),
    )


def test_an_engine_keeps_no_state_after_many_requests():
    """300 requests, a third of them cancelled, with idle periods."""
    chance = random.Random(0)
    traffic = Traffic(max_rows=8, prefill_tokens=16, cache_tokens=500)
    for number in range(300):
        traffic.submit(some_request(chance), first=chance.random() < 0.2)
        for _ in range(chance.choice([0, 0, 1, 2, 4])):
            traffic.step()
        if traffic.open and chance.random() < 0.33:
            traffic.cancel(chance.choice(sorted(traffic.open))[0])
        if number % 60 == 59:
            traffic.finish()
