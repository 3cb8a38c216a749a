"""Steering inside vLLM: `vllm serve MODEL --logits-processors mavis_dist.vllm:Steering`.

vLLM is imported nowhere else, and here by `processor` and `interrupt` alone. docs/vllm.md shows how to use it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mavis_dist.vllm.processor import Steering

__all__ = ["Steering"]

# How OpenMP's threads wait. This project lets them sleep, because its processes share cores; a vLLM that has them for
# itself is half as fast again without, and starts its processes with the environment of this one.
_GIVEN = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}


def __getattr__(name: str) -> Any:
    if name == "Steering":  # the other modules of this package work without vLLM
        from mavis_dist.vllm.processor import Steering

        for variable, value in _GIVEN.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        return Steering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
