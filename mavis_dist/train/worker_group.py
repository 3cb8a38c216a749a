"""One worker's view of the group that trains a model. No Ray."""

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
    """Collective operations of a process group, to be called on all its workers."""

    rank: int = 0
    size: int = 1
    progress: Callable[[str, int, int, str], None] = _no_progress  # (part of the work, steps done, total steps, text)
    wants_stop: Callable[[], bool] = _never  # whether the driver has asked for a stop

    def check_stop(self) -> None:
        """Raises Stopped if the driver has asked for a stop."""
        if self.wants_stop():
            raise Stopped

    def sum(self, number: float) -> float:
        """The sum over all workers."""
        if self.size == 1:
            return number
        total = torch.tensor([number], dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total)

    def broadcast(self, value: T) -> T:
        """Worker 0's value."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all workers, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all workers are here."""
        if self.size > 1:
            distributed.barrier()
