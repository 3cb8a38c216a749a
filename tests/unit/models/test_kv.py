"""The key-value cache of slots against forward passes without any cache.

Shapes: B rows, T tokens, K candidates, O outputs of the model's head.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from mavis_dist.models import kv
from mavis_dist.models.decoder import value_decoder
from mavis_dist.models.kv import SlotModel
from tests.fakes import VOCAB, tiny_value
from tests.machines import MACHINE

MODEL = tiny_value(3, num_objectives=2, layers=2)
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def small_cells(monkeypatch):
    """Caches outgrow their cells several times within a test."""
    monkeypatch.setattr(kv, "CELLS_PER_GROWTH", 4)
    monkeypatch.setattr(kv, "SLOTS_PER_GROWTH", 1)


def slots(model=MODEL, use_hf_forward=False, static_shapes=False):
    return SlotModel(value_decoder(model, use_hf_forward), static_shapes)


def branch(cache, rows, candidates):
    """Outputs of all candidates, grouped by row."""
    flat = torch.tensor([token for own in candidates for token in own])
    return cache.branch(rows, [len(own) for own in candidates], flat)


def plain(tokens, model=MODEL):
    """The head's outputs at the last token, by one forward pass over all of them."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False)[0, -1]


@pytest.fixture(params=[False, True], ids=["fused", "use_hf_forward"])
def use_hf_forward(request):
    return request.param


def test_candidates_in_one_pass_equal_one_forward_pass_each(use_hf_forward):
    """Rows of different lengths, an empty one included, each with its own number of candidates, in any order."""
    cache, tokens = slots(use_hf_forward=use_hf_forward), {0: [5, 6, 7, 8, 9], 1: [11], 2: [20, 21, 22], 3: []}
    for row in tokens:
        cache.open(row)
    cache.extend([0, 1, 2], [tokens[0], tokens[1], tokens[2]])
    rows, candidates = [2, 0, 3], [[30, 31, 32, 30], [40], [50, 51]]
    out_NO = branch(cache, rows, candidates)
    pairs = [(row, candidate) for row, own in zip(rows, candidates, strict=True) for candidate in own]
    for (row, candidate), out_O in zip(pairs, out_NO, strict=True):
        torch.testing.assert_close(out_O, plain([*tokens[row], candidate]), **TOLERANCE)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_keeping_a_candidate_equals_computing_it(index, use_hf_forward):
    """Its keys and values are where a fresh computation puts them, and all later outputs agree."""
    kept, anew = slots(use_hf_forward=use_hf_forward), slots(use_hf_forward=use_hf_forward)
    candidates_BK, start = torch.tensor([[30, 31, 32, 33], [40, 41, 42, 43]]), [[5, 6, 7], [8]]
    for cache in (kept, anew):
        for row in (0, 1):
            cache.open(row)
        cache.extend([0, 1], start)
    branch(kept, [0, 1], candidates_BK.tolist())
    kept.keep([1, 0], torch.tensor([2, index]))
    anew.extend([0, 1], [[int(candidates_BK[0, index])], [int(candidates_BK[1, 2])]])
    assert [kept.length(row) for row in (0, 1)] == [anew.length(row) for row in (0, 1)] == [4, 2]
    after = [cache.extend([0, 1], [[60], [61, 62]]) for cache in (kept, anew)]
    torch.testing.assert_close(*after, **TOLERANCE)
    torch.testing.assert_close(after[0][0], plain([5, 6, 7, 30 + index, 60]), **TOLERANCE)


def test_alternatives_move_with_their_row(use_hf_forward):
    """A row whose slot changes while it has alternatives can still keep any of them."""
    cache = slots(use_hf_forward=use_hf_forward)
    for row in (0, 1):
        cache.open(row)
    cache.extend([0, 1], [[5, 6, 7, 8, 9], [11, 12]])
    branch(cache, [1], [[30, 31, 32]])
    cache.close(0)
    cache.keep([1], torch.tensor([2]))
    torch.testing.assert_close(cache.extend([1], [[60]])[0], plain([11, 12, 32, 60]), **TOLERANCE)


def test_a_nan_row_does_not_affect_later_rows(use_hf_forward):
    """Masked cells enter the sums of attention as 0 * nan: a slot must be cleared for its next row."""
    model = tiny_value(3, layers=2)
    model.backbone.embed_tokens.weight[9] = float("nan")
    cache = slots(model, use_hf_forward)
    for row in range(4):
        cache.open(row)
    cache.extend([0, 1, 2, 3], [[5, *[9] * 20], [9] * 20, [20] * 12, [9, 3]])
    branch(cache, [0, 1, 3], [[9, 4, 5], [9], [9, 4]])
    for broken in (0, 1, 3):  # row 2 moves into the slot of row 0
        cache.close(broken)
    for row, source in ((4, None), (5, 2)):
        cache.open(row, source, shared=2)
    out_BO = cache.extend([2, 4, 5], [[21], [30, 31], [30, 31]])
    for out_O, tokens in zip(out_BO, ([20] * 12 + [21], [30, 31], [20, 20, 30, 31]), strict=True):
        torch.testing.assert_close(out_O, plain(tokens, model), **TOLERANCE)


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of calls; all outputs equal those without a cache."""

    use_hf_forward, static_shapes = False, False

    def __init__(self):
        super().__init__()
        self.cache = slots(use_hf_forward=self.use_hf_forward, static_shapes=self.static_shapes)
        self.tokens, self.next_row = {}, 0
        self.branched = {}  # row -> alternatives since its last token

    @rule(data=st.data())
    def open(self, data):
        source = data.draw(st.none() | st.sampled_from(sorted(self.tokens))) if self.tokens else None
        shared = data.draw(st.integers(0, 20))
        present = self.cache.open(self.next_row, source, shared)
        prefix = [] if source is None else self.tokens[source][:shared]
        assert present == len(prefix)
        self.tokens[self.next_row], self.branched[self.next_row] = list(prefix), []
        self.next_row += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.close(row)
        del self.tokens[row]
        assert row not in self.cache

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def extend(self, data):
        rows = self.some_rows(data)
        new = [data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)) for _ in rows]
        read = [data.draw(st.integers(0, len(tokens))) for tokens in new]
        out_RO = self.cache.extend(rows, new, read)
        for row, tokens in zip(rows, new, strict=True):
            self.tokens[row] += tokens
            self.branched[row] = []
            assert self.cache.length(row) == len(self.tokens[row])
        assert len(out_RO) == sum(read)
        for row, out_TO in zip(rows, out_RO.split(read), strict=True):
            if len(out_TO):  # the first of them and the last
                whole = self.tokens[row]
                torch.testing.assert_close(out_TO[0], plain(whole[: len(whole) - len(out_TO) + 1]), **TOLERANCE)
                torch.testing.assert_close(out_TO[-1], plain(whole), **TOLERANCE)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        """One token each, which are on the device already; rows that are not here are ignored."""
        rows = [*self.some_rows(data), *data.draw(st.sampled_from([[], [-1], [-1, -1]]))]
        new = [data.draw(st.integers(0, VOCAB - 1)) for _ in rows]
        for row, token, out_O in zip(rows, new, self.cache.append(rows, torch.tensor(new)), strict=True):
            if row >= 0:
                self.tokens[row].append(token)
                self.branched[row] = []
                torch.testing.assert_close(out_O, plain(self.tokens[row]), **TOLERANCE)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def branch(self, data):
        """Alternatives accumulate until one is kept or the row is extended, independently of other rows."""
        rows = self.some_rows(data)
        candidates = [data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)) for _ in rows]
        outputs = iter(branch(self.cache, rows, candidates))
        for row, own in zip(rows, candidates, strict=True):
            out_KO = [next(outputs) for _ in own]
            k = data.draw(st.integers(0, len(own) - 1))
            torch.testing.assert_close(out_KO[k], plain([*self.tokens[row], own[k]]), **TOLERANCE)
            self.branched[row] += own

    @precondition(lambda self: any(self.branched[row] for row in self.tokens))
    @rule(data=st.data())
    def keep(self, data):
        able = sorted(row for row in self.tokens if self.branched[row])
        rows = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=5, unique=True))
        kept = [data.draw(st.integers(0, len(self.branched[row]) - 1)) for row in rows]
        self.cache.keep(rows, torch.tensor(kept))
        for row, k in zip(rows, kept, strict=True):
            self.tokens[row].append(self.branched[row][k])
            self.branched[row] = []

    def some_rows(self, data):
        return data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, max_size=5, unique=True))

    def teardown(self):
        """Check the final state of all rows."""
        for row, tokens in self.tokens.items():
            [out_O] = self.cache.extend([row], [[1]])
            torch.testing.assert_close(out_O, plain([*tokens, 1]), **TOLERANCE)


class HFForwardMachine(CacheMachine):
    use_hf_forward = True


class StaticShapesMachine(CacheMachine):
    static_shapes = True


class StaticShapesThroughTheHFForwardMachine(CacheMachine):
    use_hf_forward, static_shapes = True, True


for machine in (CacheMachine, HFForwardMachine, StaticShapesMachine, StaticShapesThroughTheHFForwardMachine):
    machine.TestCase.settings = settings(MACHINE, max_examples=20, stateful_step_count=20)
TestAnySequenceOfCalls = CacheMachine.TestCase
TestAnySequenceOfCallsThroughTheHFForward = HFForwardMachine.TestCase
TestAnySequenceOfCallsWithStaticShapes = StaticShapesMachine.TestCase
TestAnySequenceOfCallsWithStaticShapesThroughTheHFForward = StaticShapesThroughTheHFForwardMachine.TestCase
