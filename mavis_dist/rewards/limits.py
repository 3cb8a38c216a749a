"""How long a text an encoder can read."""

from __future__ import annotations

from typing import Any

NO_LIMIT = 2**31


def max_tokens(tokenizer: Any, model: Any) -> int:
    """The longest input in tokens: what the tokenizer states, or fewer, if the model has fewer positions."""
    stated = getattr(model.config, "max_position_embeddings", None) or -1
    positions = stated - _unused(model) if stated > 0 else NO_LIMIT  # -1: any length, as XLNet has it
    return min(tokenizer.model_max_length, positions)


def _unused(model: Any) -> int:
    """Positions that no token gets: models like RoBERTa count from behind the padding id."""
    names = [(name, part) for name, part in model.named_modules() if name.endswith("position_embeddings")]
    ids = [getattr(part, "padding_idx", None) for _, part in names]
    return max((padding + 1 for padding in ids if padding is not None), default=0)
