"""The workers that train one value model together, as each of them sees the others. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


def _no_progress(done: int, total: int, text: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Team:
    """Calls that all workers of the process group make together, if there are several."""

    rank: int = 0
    size: int = 1
    progress: Callable[[int, int, str], None] = _no_progress  # (steps done, steps in all, text)
    wants_stop: Callable[[], bool] = _never  # what worker 0 hears counts

    def total(self, number: float) -> float:
        """The sum over all workers."""
        if self.size == 1:
            return number
        sum_ = torch.tensor([number], dtype=torch.float64)
        distributed.all_reduce(sum_)
        return float(sum_)

    def say(self, value: Any) -> Any:
        """What worker 0 says, on all workers."""
        if self.size == 1:
            return value
        said = [value]
        distributed.broadcast_object_list(said, src=0)
        return said[0]

    def wait(self) -> None:
        """Until all workers are here."""
        if self.size > 1:
            distributed.barrier()
