"""Functions of tensors that a GPU replays (CUDA graphs).

Starting an operation takes the host some microseconds, and a decode step has many hundred: with a small model, or few
rows, the device would mostly wait. Recorded once, they all start with one call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.utils import _pytree as pytree

MAX_RECORDINGS = 128  # of a function; their results and what lies between take memory

T = TypeVar("T")
Decorated = TypeVar("Decorated", bound=type)


class Recorder(Protocol):
    """Records what a function does to memory."""

    def __call__(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What repeats all of it, and the function's results, which are right after it has been called."""
        ...


def recorder_for(device: torch.device) -> Recorder | None:
    """None where everything runs plainly."""
    return CUDARecorder() if device.type == "cuda" else None


class CUDARecorder:
    """CUDA graphs that share memory for everything but their results."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; collecting an old graph here would spoil the new one.
        with _uncollected(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = function()
        return graph.replay, results


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def tree(cls: Decorated) -> Decorated:
    """Class decorator: a dataclass whose tensors may be arguments and results of recorded functions."""
    pytree.register_dataclass(cls)
    return cls


class Replays:
    """Recordings of one function, by the shapes of its arguments.

    A function runs plainly the first time, since libraries allocate memory then, is recorded the second, and replayed
    from then on. It must not wait for the device, nor send anything to it. It may use other tensors than its arguments,
    if they are the same ones in all calls with the same key until `clear`.
    """

    def __init__(self, device: torch.device):
        self._device, self._record = device, recorder_for(device)
        self._recordings: dict[Hashable, _Recording | None] = {}  # None: has run once

    def __call__(self, key: Hashable, function: Callable[..., T], *args: Any) -> T:
        """The function's results, which the next call may overwrite.

        Args:
            key: all that the function depends on besides tensors; None: never record it.
            args: tensors, and tuples, dicts and `tree` classes of tensors.
        """
        if self._record is None or key is None:
            return function(*args)
        leaves, structure = pytree.tree_flatten(args)
        key = key, *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        recording = self._recordings.get(key)
        if recording is None:
            is_known = key in self._recordings
            if not is_known and len(self._recordings) == MAX_RECORDINGS:
                self.clear()
            self._recordings[key] = None
            if not is_known:
                return function(*args)
            recording = self._recordings[key] = _Recording(self._record, function, leaves, structure)
        results: T = recording.replay(leaves)
        return results

    def clear(self) -> None:
        """Forget all recordings, whose shared memory ends with the last of them."""
        self._recordings.clear()
        self._record = recorder_for(self._device)


class _Recording:
    """A function with arguments at fixed places in memory."""

    def __init__(
        self, record: Recorder, function: Callable[..., Any], leaves: Sequence[Any], structure: pytree.TreeSpec
    ):
        self._function = function  # holds tensors whose memory is used
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, leaf in enumerate(inputs):
            if isinstance(leaf, torch.Tensor):
                by_dtype.setdefault(leaf.dtype, []).append(i)
        self._groups = [_Group(places, [inputs[i] for i in places]) for places in by_dtype.values()]
        self._replay, self._results = record(lambda: function(*pytree.tree_unflatten(inputs, structure)))

    def replay(self, leaves: Sequence[Any]) -> Any:
        for group in self._groups:
            torch._foreach_copy_(group.inputs, [leaves[i] for i in group.places])
        self._replay()
        return self._results


@dataclass(frozen=True)
class _Group:
    """Arguments of one type, which one operation copies."""

    places: list[int]
    inputs: list[torch.Tensor]
