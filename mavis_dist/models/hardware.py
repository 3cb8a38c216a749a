"""Names of what computes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor of this machine."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """What computes on a torch device of this machine: a GPU, or a processor with the number of its cores."""
    if not device.startswith("cuda"):
        return f"{processor()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device)
