"""Steering language models at inference time towards several objectives, on Ray.

>>> from mavis_dist import LLM
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mavis_dist.llm import LLM as LLM
    from mavis_dist.llm import Answer as Answer

__all__ = ["LLM", "Answer"]


def __getattr__(name: str) -> Any:
    """Load torch when it is asked for: importing the package, as every `--help` does, stays instant (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mavis_dist import llm

    return getattr(llm, name)
