"""What the engine needs of its base model: `SlotModel` in this process, or another engine.

Shapes: B rows, R tokens whose outputs are read, O outputs of the model's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Rows(Protocol):
    """Rows that are opened, extended and closed at any time, and numbered by the caller, as `SlotModel` has them."""

    states: torch.Tensor | None

    @property
    def device(self) -> torch.device: ...

    @property
    def is_batch_invariant(self) -> bool: ...

    @property
    def reads_answers(self) -> bool:
        """Whether `extend` returns outputs, which the rewards of a continued answer's tokens need."""
        ...

    @property
    def num_tokens(self) -> int: ...

    def __contains__(self, row: int) -> bool: ...

    def reserve(self, num_rows: int, longest: int) -> None: ...

    def open(self, row: int, source: int | None = None, shared: int = 0) -> int: ...

    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_read: Sequence[int] | None = None
    ) -> torch.Tensor: ...

    def append(self, rows: Sequence[int], tokens_B: torch.Tensor) -> torch.Tensor: ...

    def read_states(self, layer: int | None) -> bool: ...

    def close(self, row: int) -> None: ...
