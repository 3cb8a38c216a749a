"""A recorder as CUDA graphs are, for CPUs: it repeats operations on the same tensors, whatever Python would do now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Tape:
    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        operations = _Operations()
        with operations:
            results = function()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            with _disable_current_modes():
                operations.repeat()

        return replay, results


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        owned = _memory((args, kwargs))
        # Views stay as they are, however the memory changes.
        if func._schema.is_mutable or not _memory(results) <= owned:
            self._calls.append((func, args, kwargs or {}, results))
        return results

    def repeat(self) -> None:
        for func, args, kwargs, results in self._calls:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _memory(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}
