"""The workers that train one model together, as each of them sees the others. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from mavis_dist.types import Stopped

T = TypeVar("T")


def _no_progress(part: str, done: int, total: int, text: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class WorkerGroup:
    """Calls that all workers of the process group make together, if there are several."""

    rank: int = 0
    size: int = 1
    progress: Callable[[str, int, int, str], None] = _no_progress  # (part of the work, steps done, of all, text)
    wants_stop: Callable[[], bool] = _never  # whether the driver asks for a stop

    def check_stop(self) -> None:
        """Raises Stopped if the driver asks for a stop."""
        if self.wants_stop():
            raise Stopped

    def sum(self, number: float) -> float:
        """The sum over all workers."""
        if self.size == 1:
            return number
        sum_ = torch.tensor([number], dtype=torch.float64)
        distributed.all_reduce(sum_)
        return float(sum_)

    def broadcast(self, value: T) -> T:
        """Worker 0's value, on all workers."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all workers by rank, on all workers."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all workers are here."""
        if self.size > 1:
            distributed.barrier()
