"""Steering inside vLLM: `vllm serve MODEL --logits-processors mavis_dist.vllm:Steering`.

Nothing here is imported by the rest of the package, and vLLM by nothing else. docs/vllm.md shows how to use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mavis_dist.vllm.processor import Steering

__all__ = ["Steering"]


def __getattr__(name: str) -> Any:
    if name == "Steering":  # the other modules of this package work without vLLM
        from mavis_dist.vllm.processor import Steering

        return Steering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
