"""Models computed by a group of processes in lockstep, behind the narrow call of a decoder: a base model, and value
models that are too large for one of the processes.

Each process holds its shard of the weights, by the tensor-parallel plan that transformers has for the architecture, and
of the keys and values, by heads. The leader, rank 0, drives: it sends every call to the followers, who make it at the
same time, and the collectives inside the shards do the rest. A call that fails on one of them leaves the others
waiting, so a group that has lost a process, or whose call takes too long, is lost as a whole.

Shapes: B rows, L tokens of the longest, V vocabulary; those of a step as in `cache`.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import nn

from mavis_dist.models.cache import KVCache, Layout, Step
from mavis_dist.models.directory import read_model
from mavis_dist.models.hf import HFDecoder
from mavis_dist.models.masks import text_config
from mavis_dist.models.trial import try_model
from mavis_dist.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARDS_SINCE = "5.21"  # the version of transformers
COLLECTIVE_S = 60.0  # that a process may be behind the others within a call
IDLE_DAYS = 3650  # that followers wait for the next call
BASE = 0  # the number of the base model among a group's models and decoders
BACKBONE_PREFIX = "backbone."  # of the weights in a value model's folder that are not heads
Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A process in its group, and where the group's processes meet."""

    rank: int
    size: int
    host: str
    port: int


class GroupLost(RuntimeError):
    """A process of the group has died or does not keep up."""


class ShardError(UserError):
    """A model that so many processes cannot share."""


def check_shards(model: PreTrainedModel, name: str, size: int) -> None:
    """Raises ShardError unless a group of this size can compute a model, which needs no weights."""
    if size == 1:
        return
    key = f"config key 'base.tensor_parallel' is {size}: base.model {name!r}"
    if Version(transformers.__version__) < Version(SHARDS_SINCE):
        raise ShardError(
            f"config key 'base.tensor_parallel' is {size}: transformers {transformers.__version__} does not split "
            f"embeddings, install {SHARDS_SINCE} or newer, or use 1"
        )
    if not model.supports_tp_plan:
        raise ShardError(f"{key} has no tensor-parallel plan in transformers: use 1, or another model")
    config = text_config(model)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = group_sizes(gcd(heads, key_heads))
    if size not in sizes:
        raise ShardError(
            f"{key} has {heads} attention heads and {key_heads} key-value heads: use {' or '.join(map(str, sizes))}"
        )


def group_sizes(num_heads: int) -> list[int]:
    """Numbers of processes that can share so many heads out evenly."""
    return [size for size in range(1, num_heads + 1) if num_heads % size == 0]


def meeting_point(host: str, size: int) -> dist.TCPStore:
    """Where the processes of a new group meet: kept by the leader, on a free port of this address alone."""
    listening = socket.create_server((host, 0))
    port, number = listening.getsockname()[1], listening.detach()
    return dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=number)


class Shard:
    """What one process of a group computes. Its public methods are called on all of them, in the same order."""

    def __init__(self, place: Place, device: str, store: dist.Store | None = None):
        """Blocks until all processes have come. `store`: the leader's `meeting_point`."""
        self.place = place
        store = store or dist.TCPStore(place.host, place.port, place.size, is_master=False)
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        limit = timedelta(seconds=COLLECTIVE_S)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=limit)
        # Calls have a group of their own, in which a follower may wait for long.
        self._calls = dist.new_group(backend="gloo", timeout=timedelta(days=IDLE_DAYS))
        self._models: dict[int, Any] = {}  # by number; the leader's own are held by those who use them
        self._decoders: dict[int, HFDecoder] = {}

    def hold(self, model: PreTrainedModel) -> None:
        """Compute this base model, which is sharded over the group."""
        self._models[BASE] = model

    def send(self, name: str, arguments: Sequence[Any]) -> None:
        """Let the followers make a call."""
        dist.broadcast_object_list([name, arguments], src=0, group=self._calls)

    def follow(self) -> None:
        """Make the leader's calls until the group ends. Raises RuntimeError then."""
        while True:
            call: list[Any] = [None, None]
            dist.broadcast_object_list(call, src=0, group=self._calls)
            name, arguments = call
            with suppress(UserError):  # the leader raises it as well, to whoever has asked
                getattr(self, name)(*arguments)

    # --- calls ------------------------------------------------------------------------------------------------------

    def load(self, number: int, folder: str, dtype: str) -> None:
        """A follower's shard of a value model's backbone."""
        self._models[number] = self.read_backbone(folder, dtype)

    def read_backbone(self, folder: str, dtype: str) -> PreTrainedModel:
        """This process's shard of the backbone in a value model's folder.

        Raises:
            ShardError: a process of the group does not have the folder.
            ModelError: it cannot be read.
        """
        from transformers import AutoModel

        is_there = torch.tensor([Path(folder).is_dir()], dtype=torch.int32)
        dist.all_reduce(is_there, dist.ReduceOp.MIN, group=self._calls)
        if not is_there.item():
            raise ShardError(
                f"the value model in {folder} is shared out like the base model, and another machine of the group does "
                "not have this folder: keep the run in a folder that all machines have"
            )
        renamed = {f"^{re.escape(BACKBONE_PREFIX)}": ""}
        backbone: PreTrainedModel = read_model(
            AutoModel, Path(folder), dtype, num_shards=self.place.size, renamed=renamed
        )
        return backbone

    def drop(self, number: int) -> None:
        del self._models[number]

    def open(self, number: int, model: int) -> None:
        """A follower's decoder of a model."""
        held = self._models[model]
        self._decoders[number] = decoder_of(held, lambda **inputs: held(**inputs)[0])

    def close(self, number: int) -> None:
        del self._decoders[number]

    @torch.inference_mode()
    def step(self, number: int, changes: Sequence[tuple[str, Any]], message: StepMessage) -> None:
        """A follower's step, after changes of its cache."""
        decoder = self._decoders[number]
        for name, arguments in changes:
            getattr(decoder.cache, name)(*(_on(decoder.device, argument) for argument in arguments))
        decoder.step(message.step_on(decoder.device))

    @torch.inference_mode()
    def logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of whole texts."""
        model = self._models[BASE]
        found: torch.Tensor = model(input_ids=ids_BL.to(model.device)).logits
        return found


def decoder_of(model: Any, forward: Forward, cache: KVCache | None = None) -> HFDecoder:
    """A process's part of a decoder. `forward` returns the outputs of a head, which all processes need to compute only
    where the head is sharded.
    """
    try_model(model.base_model)
    return HFDecoder(model.base_model, forward, cache)


class StepMessage(NamedTuple):
    """A step as it travels: a follower makes the layout anew."""

    slots: tuple[int, ...]
    widths: tuple[int, ...]
    num_slots: int
    is_static: bool
    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    cells_N: torch.Tensor
    read_R: torch.Tensor
    num_visible: int
    num_cells: int

    @classmethod
    def of(cls, step: Step) -> StepMessage:
        layout = step.layout
        return cls(
            tuple(layout.slots),
            tuple(layout.widths),
            len(layout.count_Z),
            layout.is_static,
            step.tokens_N.cpu(),
            step.positions_N.cpu(),
            step.cells_N.cpu(),
            step.read_R.cpu(),
            step.num_visible,
            step.num_cells,
        )

    def step_on(self, device: torch.device) -> Step:
        """The step without its caller: outputs are the leader's."""
        rows = range(len(self.slots))
        layout = Layout(self.slots, self.widths, rows, self.widths, device, self.num_slots, self.is_static)
        return Step(
            layout,
            self.tokens_N.to(device),
            self.positions_N.to(device),
            self.cells_N.to(device),
            self.read_R.to(device),
            self.num_visible,
            self.num_cells,
        )


class Leader:
    """Drives a group. Thread-safe: while a model loads, the others wait."""

    def __init__(self, shard: Shard, model: PreTrainedModel, on_loss: Callable[[GroupLost], None]):
        """`on_loss` is called, before GroupLost is raised, when the group is lost."""
        self._shard, self._on_loss = shard, on_loss
        self._lock = threading.RLock()
        self._numbers = count(BASE + 1)
        self._unused: deque[tuple[str, int]] = deque()  # calls that free what was dropped, maybe by another thread
        shard.hold(model)
        _LED[model.base_model] = self, BASE

    @property
    def size(self) -> int:
        """Processes of the group."""
        return self._shard.place.size

    def load(self, folder: Path, dtype: str) -> PreTrainedModel:
        """The backbone in a value model's folder, shared out; the followers' parts are freed with it.

        Raises:
            ShardError, ModelError: as in `Shard.read_backbone`.
        """
        with self._lock:
            number, where = next(self._numbers), str(folder)
            backbone: PreTrainedModel = self._call(
                "load", (number, where, dtype), lambda: self._shard.read_backbone(where, dtype)
            )
        _LED[backbone.base_model] = self, number
        finalize(backbone, self._unused.append, ("drop", number))
        return backbone

    def decoder(self, model: Any, forward: Forward) -> LeadingDecoder:
        """A decoder over the shards; `forward` is this process's own, and returns the outputs of its head."""
        _, led = _LED[model.base_model]
        cache = RecordedCache(int(text_config(model).num_hidden_layers))
        with self._lock:
            number = next(self._numbers)
            own = self._call("open", (number, led), lambda: decoder_of(model, forward, cache))
        decoder = LeadingDecoder(self, number, own, cache)
        finalize(decoder, self._unused.append, ("close", number))
        return decoder

    def step(self, number: int, cache: RecordedCache, own: HFDecoder, step: Step) -> torch.Tensor:
        with self._lock:
            changes = cache.take_changes()
            return self._call("step", (number, changes, StepMessage.of(step)), lambda: own.step(step))

    def logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of whole texts."""
        with self._lock:
            return self._call("logits", (ids_BL.cpu(),), lambda: self._shard.logits(ids_BL))

    def _call(self, name: str, arguments: tuple[Any, ...], own: Callable[[], Any]) -> Any:
        """Let the followers make a call, and this process its own part of it."""
        try:
            while self._unused:
                freeing, number = self._unused.popleft()
                self._shard.send(freeing, (number,))
            self._shard.send(name, arguments)
            return own()
        except RuntimeError as error:  # torch raises it for whatever happens in a group
            lost = GroupLost(f"a process of the group of {self.size} is lost ({error})")
            self._on_loss(lost)
            raise lost from error


# By decoder, without the head: who drives it, and which of the group's models it is.
_LED: WeakKeyDictionary[nn.Module, tuple[Leader, int]] = WeakKeyDictionary()


def leader_of(model: Any) -> Leader | None:
    """The leader of the group that computes a model; None: this process computes it alone."""
    return _LED.get(model.base_model, (None, BASE))[0]


class RecordedCache(KVCache):
    """The leader's keys and values, which remembers how rows have moved, for the followers' caches."""

    def __init__(self, num_layers: int):
        super().__init__(num_layers)
        self._changes: list[tuple[str, Any]] = []

    def take_changes(self) -> list[tuple[str, Any]]:
        """What has happened since the last call: names of methods and their arguments."""
        changes, self._changes = self._changes, []
        return changes

    def resize(self, num_slots: int, num_cells: int) -> None:
        self._changes.append(("resize", (num_slots, num_cells)))
        super().resize(num_slots, num_cells)

    def clear(self) -> None:
        self._changes = [("clear", ())]
        super().clear()

    def copy(self, source: int, target: int, length: int) -> None:
        self._changes.append(("copy", (source, target, length)))
        super().copy(source, target, length)

    def move_cells(self, slot_B: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        self._changes.append(("move_cells", tuple(tensor.cpu() for tensor in (slot_B, source_B, target_B))))
        super().move_cells(slot_B, source_B, target_B)


class LeadingDecoder:
    """The decoder of a group, as the leader's engine uses it."""

    is_batch_invariant = False
    states: torch.Tensor | None = None

    def __init__(self, leader: Leader, number: int, own: HFDecoder, cache: RecordedCache):
        self._leader, self._number, self._own = leader, number, own
        self.cache: KVCache = cache
        self._recorded, self.device = cache, own.device

    def step(self, step: Step) -> torch.Tensor:
        return self._leader.step(self._number, self._recorded, self._own, step)

    def read_states(self, layer: int | None) -> bool:
        return layer is None


def _on(device: torch.device, argument: Any) -> Any:
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument
