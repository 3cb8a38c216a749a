"""A decode step as a device would run it, without one: what crosses between host and device, and all shapes.

With `static_shapes` the engine on a CPU runs the path of a GPU, and a tape stands for its graphs. A read makes the host
wait for the device; a copy sends it something from the host.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer, scorer
from mavis_dist.models import replay
from tests.fakes import EOS, VOCAB, tiny_base, tiny_student, tiny_value
from tests.tape import Tape

BASE = tiny_base(seed=0, eos_boost=-1.0)
MODELS = {"brief": tiny_value(1, layers=2), "kind": tiny_value(2)}
ENDLESS = tiny_base(seed=0)
ENDLESS.model.lm_head.weight[EOS] = 0.0  # a logit of 0 is never among the largest
STUDENT = tiny_student(3, num_objectives=2)
STUDENTS = {"kind": (STUDENT, 0), "brief": (STUDENT, 1)}
MAX_READS, MAX_COPIES = 1, 3
MAX_STARTED = {"unguided": 60, "lazy": 200, "full": 200, "half guided": 200, "mixed": 200, "predicted": 200}

# Operations whose result, or its shape, the host has to wait for.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}
COPIES = {"lift_fresh", "lift_fresh_copy"}  # tensors made from Python numbers


class Traffic(TorchDispatchMode):
    """Counts what crosses between host and device, and records the shapes of all operations."""

    def __init__(self):
        super().__init__()
        self.reads, self.copies, self.shapes = Counter(), Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_masked = name in ("index", "index_put", "index_put_") and any(
            x.dtype == torch.bool for x in args[1] if x is not None
        )
        waits_for_counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or is_masked or waits_for_counts:
            self.reads[name] += 1
        if name in COPIES:
            self.copies[name] += 1
        self.shapes.append((name, [tuple(x.shape) for x in tensors]))
        return func(*args, **(kwargs or {}))

    def counting(self, counter: Counter, function):
        def run(*args, **kwargs):
            counter[function.__name__] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **kwargs)

        return run


@contextmanager
def traffic():
    """Also counts transfers that are no operations on a CPU."""
    mode = Traffic()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, mode.counting(mode.reads, getattr(torch.Tensor, name)))
        for name in ("tensor", "from_numpy", "as_tensor"):
            patch.setattr(torch, name, mode.counting(mode.copies, getattr(torch, name)))
        stack.enter_context(mode)
        yield mode


def requests(count: int, **fields) -> list[Request]:
    """Prompts of different lengths, and settings that differ from row to row."""
    weights = [{"brief": 1.0}, {"kind": 0.7, "brief": 0.3}, {"kind": 1.0}]
    return [
        Request(
            str(i),
            tuple(range(3, 9 + 2 * i)),
            weights=weights[i % 3],
            tilt_cap=1.0,
            beta=3.0,
            params=SamplingParams(
                max_tokens=40,
                seed=i,
                top_k=[40, 20, VOCAB][i % 3],
                top_p=[1.0, 0.9][i % 2],
                temperature=[1.0, 0.8, 0.0][i % 3],
            ),
        )
        for i in range(count)
    ]


def only(kind: str, count: int) -> list[Request]:
    chosen = requests(count)
    if kind == "unguided":
        return [replace(request, weights={}) for request in chosen]
    if kind == "half guided":
        return [replace(request, weights=request.weights if i % 2 else {}) for i, request in enumerate(chosen)]
    if kind == "mixed":
        return [replace(request, scorer=[Scorer.LAZY, Scorer.FULL][i % 2]) for i, request in enumerate(chosen)]
    if kind == "every other":
        return [replace(request, guide_every=2) for request in chosen]
    return [replace(request, scorer=Scorer(kind)) for request in chosen]


KINDS = ["unguided", "lazy", "full", "half guided", "mixed", "predicted"]


def engine_of(static_shapes: bool, max_rows: int = 16, base=BASE) -> Engine:
    guide = LocalGuide(MODELS, STUDENTS, static_shapes=static_shapes)
    return Engine(base, guide, max_rows=max_rows, static_shapes=static_shapes)


def running(kind: str, count: int) -> Engine:
    """An engine in the middle of its answers; guided rows use both value models, each of which has its own bucket."""
    engine = engine_of(static_shapes=True, base=ENDLESS)
    for request in only(kind, count):
        weights = {"brief": 0.3, "kind": 0.7} if request.weights else {}
        params = replace(request.params, top_k=min(request.params.top_k, 20))
        engine.submit(replace(request, weights=weights, params=params))
    for _ in range(3):
        assert len(engine.step()) == count
    return engine


@pytest.fixture(autouse=True)
def one_call(monkeypatch):
    """The first call decides, as nearly always in practice: these random models are less predictable than real ones."""
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", VOCAB)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """What is recorded from now on."""
    made: list[Tape] = []

    def make(device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(replay, "recorder_for", make)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_device_once(kind):
    """One read and at most three copies, in any step in which no row starts or ends."""
    engine = running(kind, 5)
    for _ in range(6):
        with traffic() as seen:
            assert len(engine.step()) == 5
        assert seen.reads.total() <= MAX_READS, seen.reads
        assert seen.copies.total() <= MAX_COPIES, seen.copies


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_of_a_step_depend_on_the_bucket_only(kind):
    """Six to eight rows, step by step: the same operations on tensors of the same shapes."""
    recorded = []
    for count in (6, 7, 8):
        engine = running(kind, count)
        for _ in range(4):
            with traffic() as seen:
                engine.step()
            recorded.append(seen.shapes)
    for shapes in recorded[1:]:
        assert shapes == recorded[0]


@pytest.mark.parametrize("kind", [*KINDS, "every other", "qhead"])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_answers_are_those_of_exact_shapes(kind, chunk, monkeypatch):
    """Rows end and start meanwhile; the same first chunk, since estimates depend on what was evaluated."""
    monkeypatch.setattr(scorer, "FIRST_CHUNK", chunk)
    monkeypatch.setattr(scorer, "SLACK", float("inf"))
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", chunk)
    exact, static = (
        [choice for [choice] in engine_of(shapes, max_rows=5).generate(only(kind, 11))] for shapes in (False, True)
    )
    for expected, choice in zip(exact, static, strict=True):
        assert (choice.tokens, choice.num_scored) == (expected.tokens, expected.num_scored)
        np.testing.assert_allclose(choice.logratios, expected.logratios, atol=1e-4)
        np.testing.assert_allclose(choice.divergences, expected.divergences, atol=1e-3)
        assert choice.values.keys() == expected.values.keys()
        for name, values in choice.values.items():
            np.testing.assert_allclose(values, expected.values[name], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_answers_are_those_of_exact_shapes(kind, tapes, monkeypatch):
    """Also where rows end, move and start between replays, the cache grows, and a second call is needed."""
    monkeypatch.setattr(scorer, "FIRST_CHUNK", 4)
    monkeypatch.setattr(scorer, "SLACK", float("inf"))
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", 4)
    exact = [choice for [choice] in engine_of(False, max_rows=5).generate(only(kind, 11))]
    engine = engine_of(True, max_rows=5)
    for _ in range(2):  # the second time over recordings of the first
        recorded = [choice for [choice] in engine.generate(only(kind, 11))]
        assert [choice.tokens for choice in recorded] == [choice.tokens for choice in exact]
        for expected, choice in zip(exact, recorded, strict=True):
            np.testing.assert_allclose(choice.logratios, expected.logratios, atol=1e-4)
            np.testing.assert_allclose(choice.divergences, expected.divergences, atol=1e-3)
    assert sum(tape.num_replayed for tape in tapes) > 2 * sum(tape.num_recorded for tape in tapes) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_starts_few_operations(kind, tapes):
    """Everything that takes time is replayed: passes of the models, and draws."""
    engine = running(kind, 5)
    num_recorded = sum(tape.num_recorded for tape in tapes)
    for _ in range(6):
        with traffic() as seen:
            assert len(engine.step()) == 5
        assert seen.reads.total() <= MAX_READS, seen.reads
        assert seen.copies.total() <= MAX_COPIES, seen.copies
        assert len(seen.shapes) <= MAX_STARTED[kind], Counter(name for name, _ in seen.shapes)
    assert sum(tape.num_recorded for tape in tapes) == num_recorded > 0
