"""Memory for what a forward pass reads from end to end: weights, keys and values."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

_HUGE_PAGE, _CACHE_LINE = 1 << 21, 64  # bytes


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in pages of 2 MiB, where the system has them.

    A step reads hundreds of megabytes in order, and looking up a page for every 4 KiB of them takes up to a quarter of
    its time.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + num_bytes].view(dtype).view(*shape)


class Arena:
    """One piece of memory for many tensors, which fill it in the order in which they are read."""

    def __init__(self, num_bytes: int, count: int):
        """Room for `count` tensors of so many bytes in all."""
        self._memory, self._used = zeros([num_bytes + count * _CACHE_LINE], torch.uint8), 0

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in the arena."""
        num_bytes = tensor.numel() * tensor.itemsize
        copy = self._memory[self._used : self._used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-num_bytes // _CACHE_LINE) * _CACHE_LINE
        return copy.copy_(tensor)
