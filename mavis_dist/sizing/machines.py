"""Machines that may not exist yet: `4x8xH100`, `2x16cpu`, or this one, with the rates of what computes on them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from mavis_dist.plan import Node
from mavis_dist.types import UserError

GIB = 2**30
CPUS_PER_GPU, GIB_PER_GPU = 16, 128  # of a machine with GPUs, assumed: those of the one that was measured
GIB_PER_CPU = 4  # of a machine without GPUs, assumed


@dataclass(frozen=True)
class Chip:
    """A GPU, or one core of a processor."""

    name: str
    memory_gib: float  # of a GPU; 0: the machine's memory
    tflops: float  # products of dense bfloat16 matrices
    gb_per_s: float  # reads of its memory
    read_fraction: float = 0.92  # of `gb_per_s` that is reached; measured on an H100 (docs/figures/device.json)
    matmul_fraction: float = 0.80  # of `tflops`; measured there
    train_fraction: float = 0.25  # of `tflops` that a training step reaches; measured there
    layer_s: float = 1e-4  # of every layer in a step, beside reads and products; measured there

    @property
    def read_bytes_per_s(self) -> float:
        return self.gb_per_s * 1e9 * self.read_fraction

    @property
    def flops_per_s(self) -> float:
        return self.tflops * 1e12 * self.matmul_fraction


# Memory, products without sparsity and bandwidth from NVIDIA's public data sheets.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("A10", 24, 125, 600),
        Chip("L4", 24, 121, 300),
        Chip("L40S", 48, 362, 864),
        Chip("A100-40GB", 40, 312, 1555),
        Chip("A100", 80, 312, 2039),
        Chip("H100", 80, 989, 3350),
        Chip("H200", 141, 989, 4800),
        Chip("B200", 180, 2250, 8000),
    )
}
# What decoding and training reach on each of two cores of an AMD EPYC (docs/figures/decode.json, values.json).
CORE = Chip("core", 0, 0.144, 11.5, read_fraction=1, matmul_fraction=1, train_fraction=0.4, layer_s=0)


@dataclass(frozen=True)
class Machines:
    """Machines of one kind."""

    count: int
    cpus: float  # of each
    memory_gib: float  # of each
    gpus: int = 0  # of each
    gpu: Chip | None = None
    price_per_hour: float | None = None  # of each

    @property
    def nodes(self) -> list[Node]:
        return [self.node] * self.count

    @property
    def node(self) -> Node:
        return Node(self.cpus, self.gpus)

    @property
    def text(self) -> str:
        gpus = f" + {self.gpus} {self.gpu.name} of {self.gpu.memory_gib:g} GiB" if self.gpu else ""
        noun = "machine" if self.count == 1 else "machines"
        return f"{self.count} {noun}, each {self.cpus:g} cores + {self.memory_gib:g} GiB{gpus}"


def parse_machines(text: str) -> Machines:
    """Machines from `4x8xH100` (machines, GPUs of each, their kind) or `2x16cpu` (machines, cores of each).

    Raises:
        UserError: it is not of this form, a number is 0, or the kind is unknown.
    """
    found = re.fullmatch(r"(\d+)x(\d+)(cpu|x[\w-]+)", text)
    if found is None or int(found[1]) < 1 or int(found[2]) < 1:
        raise UserError(
            f"--machines {text!r} is not of the form 4x8xH100 (machines, GPUs of each, kind) or 2x16cpu (machines, "
            "cores of each), with numbers above 0"
        )
    count, each, kind = int(found[1]), int(found[2]), found[3].removeprefix("x")
    if kind == "cpu":
        return Machines(count, each, each * GIB_PER_CPU)
    gpu = {name.lower(): chip for name, chip in GPUS.items()}.get(kind.lower())
    if gpu is None:
        raise UserError(f"--machines {text!r}: the GPU {kind!r} is unknown, use one of {', '.join(GPUS)}")
    return Machines(count, each * CPUS_PER_GPU, each * GIB_PER_GPU, each, gpu)


def this_machine() -> Machines:
    """The cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machines(1, os.cpu_count() or 1, round(memory / GIB))
