"""Peak rates of a device, and the least time that they allow for a step of the decoder."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device.models import WEIGHT_BYTES, Shape

READ_BYTES = {"cuda": 4 * 2**30, "cpu": 64 * 2**20}  # far more than caches hold
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
TRIES, CALLS = 5, 4  # calls of a try follow each other without waiting


@dataclass(frozen=True)
class Machine:
    """Peak rates, as measured."""

    read_bytes_per_s: float
    matmul_flops_per_s: float

    def limit_ms(self, shape: Shape, rows: int, visible: float) -> float:
        """Milliseconds of a step in which every weight is read once and multiplied once per row, and in which the keys
        and values of `visible` tokens of every row are read.
        """
        read = shape.num_weights * WEIGHT_BYTES + rows * visible * shape.token_bytes
        return 1000 * (read / self.read_bytes_per_s + 2 * rows * shape.num_weights / self.matmul_flops_per_s)


def measure(device: torch.device) -> Machine:
    """The best of some tries, of reading as a sum or as a copy; the product is one of large bfloat16 matrices."""
    flops = _matmul_flops_per_s(MATMUL_SIZE[device.type], device)
    rates = Machine(_read_bytes_per_s(READ_BYTES[device.type], device), flops)
    free(device)
    return rates


def _read_bytes_per_s(num_bytes: int, device: torch.device) -> float:
    buffer = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(buffer)
    copy_s = _shortest(lambda: target.copy_(buffer), device)
    return max(num_bytes / _shortest(buffer.sum, device), 2 * num_bytes / copy_s)


def _matmul_flops_per_s(size: int, device: torch.device) -> float:
    factor = torch.randn(size, size, device=device).bfloat16()  # equal numbers would take less power, and run faster
    return 2 * size**3 / _shortest(lambda: factor @ factor, device)


def _shortest(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(1 + TRIES):
        wait(device)
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / CALLS


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Return the memory of what is not referred to any more, and start to measure the peak again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Most memory in tensors since `free`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
