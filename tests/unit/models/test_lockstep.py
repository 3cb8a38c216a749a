"""What a group of processes exchanges; the group itself is tested on a cluster."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_dist.models import lockstep
from mavis_dist.models.cache import KVCache
from mavis_dist.models.hf import HFDecoder
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel, load_base, load_skeleton
from mavis_dist.models.lockstep import RecordedCache, ShardError, StepMessage, check_shards, leader_of
from mavis_dist.models.states import first_layers
from tests.tiny import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(write_base(tmp_path_factory.mktemp("base"))))


class Mirrored:
    """A leader's decoder whose every step a follower with the same weights makes from the message alone."""

    is_batch_invariant = False
    states = None

    def __init__(self, base: BaseModel):
        def forward(**inputs: torch.Tensor) -> torch.Tensor:
            return base.model(**inputs).logits

        self.cache: RecordedCache = RecordedCache(base.model.config.num_hidden_layers)
        self._own = HFDecoder(base.model.base_model, forward, self.cache)
        self._other = HFDecoder(base.model.base_model, forward)
        self.device = self._own.device

    @property
    def other(self) -> KVCache:
        return self._other.cache

    def step(self, step):
        changes, message = pickle.loads(pickle.dumps((self.cache.take_changes(), StepMessage.of(step))))
        for name, arguments in changes:
            getattr(self.other, name)(*arguments)
        out, again = self._own.step(step), self._other.step(message.step_on(self.device))
        assert torch.equal(out, again)
        return out

    def read_states(self, layer: int | None) -> bool:
        return layer is None


def tensors(cache: KVCache) -> list[torch.Tensor]:
    return [part for parts in cache._parts for part in parts if part is not None]


OPERATIONS = st.lists(st.tuples(st.sampled_from(["open", "fork", "close", "extend", "branch"]), st.integers(0, 5)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(operations=OPERATIONS, static=st.booleans())
def test_a_follower_has_the_keys_and_values_of_the_leader(base: BaseModel, operations, static: bool) -> None:
    decoder = Mirrored(base)
    model, rows = SlotModel(decoder, static_shapes=static), list[int]()
    for number, (name, amount) in enumerate(operations):
        if name in ("open", "fork") or not rows:
            model.open(number, rows[amount % len(rows)] if name == "fork" and rows else None, shared=amount)
            rows.append(number)
            model.extend([number], [list(range(2, 4 + amount))])
        elif name == "close":
            model.close(rows.pop(amount % len(rows)))
        elif name == "extend":
            model.append(rows, torch.full((len(rows),), 5 + amount))
        else:
            counts = [1 + amount % 2] * len(rows)
            model.branch(rows, counts, torch.arange(2, 2 + sum(counts)))
            model.keep(rows, torch.zeros(len(rows), dtype=torch.long))
        if rows:
            model.append(rows, torch.full((len(rows),), 7))
            assert all(map(torch.equal, tensors(decoder.cache), tensors(decoder.other)))


def test_a_model_is_shared_by_as_many_processes_as_its_heads_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = load_skeleton("smollm2-135m-instruct").model
    for size in (1, 3):
        check_shards(skeleton, "smollm", size)
    sentence = (
        "config key 'base.tensor_parallel' is 2: base.model 'smollm' has 9 attention heads and 3 key-value heads: "
        "use 1 or 3"
    )
    with pytest.raises(ShardError) as caught:
        check_shards(skeleton, "smollm", 2)
    assert str(caught.value) == sentence
    monkeypatch.setattr(lockstep.transformers, "__version__", "5.20.1")
    with pytest.raises(ShardError, match=r"transformers 5\.20\.1 does not split embeddings, install 5\.21 or newer"):
        check_shards(skeleton, "smollm", 3)
    monkeypatch.undo()
    skeleton._tp_plan, skeleton.base_model._tp_plan, skeleton.config.base_model_tp_plan = {}, {}, None
    with pytest.raises(ShardError, match="has no tensor-parallel plan in transformers: use 1"):
        check_shards(skeleton, "smollm", 3)


def test_a_model_of_one_process_has_no_leader(base: BaseModel) -> None:
    assert leader_of(base.model) is None
    assert leader_of(first_layers(base.model, 1)) is None
