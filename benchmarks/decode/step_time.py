"""Time of the parts of a decode step, and the step's distance from the machine's roofline."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.common.workload import Workload, weight_settings
from mavis_dist.decode import Engine, LocalGuide, Scorer
from mavis_dist.decode import engine as decode_engine
from mavis_dist.models.packed import PackedLinear
from mavis_dist.types import TILT_CAP

PARTS = ("base", "guide", "sampling", "bookkeeping")
NUM_OBJECTIVES = 2
LONGEST_ANSWER = 256  # answers are cancelled before they have so many tokens
READ_BYTES = 512 * 2**20
MATMUL_SIZE = 2048
TRIES = 10

Parts = dict[str, float]  # ms per step


class Stopwatch:
    """Seconds by part, exclusive of parts that are called within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part, self._since = "", 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outer = self._part
            self._switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(outer)

        return run

    def _switch(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


class Timed:
    """Proxy of an object whose methods are timed as one part."""

    def __init__(self, target: Any, watch: Stopwatch, part: str):
        self._target, self._watch, self._part = target, watch, part

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        return self._watch.timed(self._part, attribute) if callable(attribute) else attribute

    def __contains__(self, item: Any) -> bool:
        return item in self._target


class StepClock:
    """An engine with timed parts."""

    def __init__(self, workload: Workload, max_rows: int):
        self._workload, self._watch = workload, Stopwatch()
        guide: Any = Timed(LocalGuide(workload.models), self._watch, "guide")
        engine: Any = Engine(workload.endless, guide, max_rows=max_rows)
        engine._base = Timed(engine._base, self._watch, "base")
        self._step = self._watch.timed("bookkeeping", engine.step)
        self._draw = self._watch.timed("sampling", decode_engine.draw)
        self._engine = engine

    def measure(self, size: int, num_objectives: int, num_steps: int) -> Parts:
        """ms per step of each part, with all prompts prefilled and all rows generating."""
        weights = weight_settings([*self._workload.models][:num_objectives])
        requests = self._workload.requests(size, weights, LONGEST_ANSWER, Scorer.LAZY, TILT_CAP)
        for request in requests:
            self._engine.submit(request)
        generating: set[str] = set()
        with patch.object(decode_engine, "draw", self._draw):
            while len(generating) < size:
                generating.update(update.request_id for update in self._step())
            self._watch.seconds.clear()
            for _ in range(num_steps):
                self._step()
        for request in requests:
            self._engine.cancel(request.id)
        return {part: 1000 * self._watch.seconds[part] / num_steps for part in PARTS}


@dataclass(frozen=True)
class Machine:
    """Peak rates of the machine."""

    read_bytes_per_s: float
    matmul_flops_per_s: float

    def minimum_ms(self, base: Any, size: int) -> float:
        """Roofline time of a step: every weight is read once and multiplied once per row."""
        maps = [part for part in base.modules() if isinstance(part, (nn.Linear, PackedLinear))]
        num_weights = sum(part.in_features * part.out_features for part in maps)
        read_s = num_weights * base.dtype.itemsize / self.read_bytes_per_s
        return 1000 * (read_s + 2 * size * num_weights / self.matmul_flops_per_s)


def measure_machine() -> Machine:
    buffer = torch.ones(READ_BYTES // 4)
    factor = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16)
    return Machine(READ_BYTES / _shortest(buffer.sum), 2 * MATMUL_SIZE**3 / _shortest(lambda: factor @ factor))


def _shortest(function: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(workload: Workload, sizes: Sequence[int], repetitions: int, num_steps: int) -> dict[str, Any]:
    """Medians over repetitions of the parts of guided and unguided steps, and the roofline."""
    clock = StepClock(workload, max(sizes))
    parts: dict[tuple[int, int], list[Parts]] = defaultdict(list)
    machines = []
    for _ in range(repetitions):
        machines.append(measure_machine())
        for size in sizes:
            for count in (0, NUM_OBJECTIVES):
                parts[count, size].append(clock.measure(size, count, num_steps))
    machine = Machine(max(m.read_bytes_per_s for m in machines), max(m.matmul_flops_per_s for m in machines))
    return {
        "step_ms": {f"b{size}": _medians(parts[NUM_OBJECTIVES, size]) for size in sizes},
        "unguided_step_ms": {f"b{size}": _medians(parts[0, size]) for size in sizes},
        "roofline_ms": {f"b{size}": machine.minimum_ms(workload.base.model, size) for size in sizes},
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "matmul_gflops": machine.matmul_flops_per_s / 1e9,
    }


def _medians(repetitions: Sequence[Parts]) -> Parts:
    return {part: statistics.median(parts[part] for parts in repetitions) for part in PARTS}
