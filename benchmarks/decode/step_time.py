"""Where the time of a decode step goes, and how near it is to what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common.workload import Workload, mixtures
from mavis_dist.decode import Engine, LocalGuide, Scorer
from mavis_dist.types import TILT_CAP

PARTS = ("base", "guide", "sampling", "bookkeeping")
NUM_OBJECTIVES = 2
LONGEST_ANSWER = 256  # more tokens than any answer gets before it is cancelled
READ_BYTES = 512 * 2**20
MATMUL_SIZE = 2048
TRIES = 3

Parts = dict[str, float]  # ms per step


class Stopwatch:
    """Seconds by part. A part that is called by another one is not counted in it."""

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
    """Any object, the time of whose methods is one part."""

    def __init__(self, target: Any, watch: Stopwatch, part: str):
        self._target, self._watch, self._part = target, watch, part

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        return self._watch.timed(self._part, attribute) if callable(attribute) else attribute

    def __contains__(self, item: Any) -> bool:
        return item in self._target


class StepClock:
    """An engine whose parts are timed from outside."""

    def __init__(self, workload: Workload, max_rows: int):
        self._workload, self._watch = workload, Stopwatch()
        guide: Any = Timed(LocalGuide(workload.models), self._watch, "guide")
        engine: Any = Engine(workload.endless, guide, max_rows=max_rows)
        engine._base = Timed(engine._base, self._watch, "base")
        engine._draw = self._watch.timed("sampling", engine._draw)
        self._step = self._watch.timed("bookkeeping", engine.step)
        self._engine = engine

    def measure(self, size: int, num_objectives: int, num_steps: int) -> Parts:
        """ms per step of each part, from where all prompts are read and all answers are being written."""
        weights = mixtures([*self._workload.models][:num_objectives])
        requests = self._workload.requests(size, weights, LONGEST_ANSWER, Scorer.LAZY, TILT_CAP)
        for request in requests:
            self._engine.submit(request)
        writing: set[str] = set()
        while len(writing) < size:
            writing.update(update.request_id for update in self._step())
        self._watch.seconds.clear()
        for _ in range(num_steps):
            self._step()
        for request in requests:
            self._engine.cancel(request.id)
        return {part: 1000 * self._watch.seconds[part] / num_steps for part in PARTS}


@dataclass(frozen=True)
class Machine:
    """What the machine can do with the base model."""

    read_bytes_per_s: float
    matmul_flops_per_s: float

    def least_ms(self, base: nn.Module, size: int) -> float:
        """Every weight is read once and takes part in one multiplication per row."""
        weights = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
        read_s = sum(w.numel() * w.element_size() for w in weights) / self.read_bytes_per_s
        matmul_s = 2 * size * sum(w.numel() for w in weights) / self.matmul_flops_per_s
        return 1000 * (read_s + matmul_s)


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
    """Medians over repetitions: parts of guided and unguided steps, and the part of the roofline that is reached."""
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
        "roofline_ms": {f"b{size}": machine.least_ms(workload.base.model, size) for size in sizes},
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "matmul_gflops": machine.matmul_flops_per_s / 1e9,
    }


def _medians(repetitions: Sequence[Parts]) -> Parts:
    return {part: statistics.median(parts[part] for parts in repetitions) for part in PARTS}
