"""What every layer of a model sees, from the model's own description of its layers.

Models make masks themselves as long as a row is one text. Trees in one row, and rows of the slot cache, need masks made
here: who sees whom comes from the caller, and windows and chunks from the config, measured in positions of a path.

Shapes: B rows, T tokens, S tokens that may be seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from mavis_dist.models.directory import ModelError

# Layer types as transformers names them.
FULL, WINDOWED, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
EAGER, SDPA = "eager", "sdpa"

SIZES = {WINDOWED: "sliding_window", CHUNKED: "attention_chunk_size"}  # config keys
MADE_BY = {WINDOWED: "create_sliding_window_causal_mask", CHUNKED: "create_chunked_causal_mask"}  # in the model's code

# Types of models whose own code does not do what is asked of it here, whatever masks and positions it is given.
REFUSED = {
    "openai-gpt": "it keeps no keys and values",
    "xlm": "it keeps no keys and values",
}

Masks = torch.Tensor | dict[str, torch.Tensor]
Within = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]  # config, positions of two tokens -> bool

WITHIN: dict[str, Within] = {
    FULL: lambda config, query, key: torch.ones((), dtype=torch.bool, device=query.device),
    WINDOWED: lambda config, query, key: query - key < config.sliding_window,
    CHUNKED: lambda config, query, key: query // config.attention_chunk_size == key // config.attention_chunk_size,
}


def layer_types(model: Any) -> set[str]:
    """The kinds of layers of a decoder.

    Without `layer_types` in the config, a window or chunk applies to all layers. Where the model's code makes no such
    masks, a config may state them all the same, and they have no effect.
    """
    config, code = text_config(model), vars(sys.modules[type(_own(model)).__module__])
    everywhere = [kind for kind, key in SIZES.items() if getattr(config, key, None)]
    stated = getattr(config, "layer_types", None) or everywhere[:1] or [FULL]
    return {FULL if kind in MADE_BY and MADE_BY[kind] not in code else kind for kind in stated}


def attention_masks(model: Any, seen_BTS: torch.Tensor, query_BT: torch.Tensor, key_BTS: torch.Tensor) -> Masks:
    """The attention mask [B, 1, T, S] of a Hugging Face decoder; by layer type where it has several.

    Args:
        model: the decoder, or a model around it.
        seen_BTS: bool, what a token sees where there are no windows: its ancestors and itself.
        query_BT: the positions of the tokens in their texts.
        key_BTS: the positions of what they may see; [B, 1, S] where all tokens of a row agree.
    """
    config, query_BT1 = text_config(model), query_BT[:, :, None]
    masks = {
        kind: _as_attention_expects(model, seen_BTS & WITHIN[kind](config, query_BT1, key_BTS))[:, None]
        for kind in sorted(layer_types(model))
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def tree_inputs(
    model: Any, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, mask_BSS: torch.Tensor
) -> dict[str, Any]:
    """Arguments of a Hugging Face decoder for packed trees, on its device; see `mavis_dist.core.packing`."""
    tokens_BS, positions_BS, mask_BSS = (x.to(model.device) for x in (tokens_BS, positions_BS, mask_BSS))
    return {
        "input_ids": tokens_BS,
        "position_ids": positions_BS,
        "attention_mask": attention_masks(model, mask_BSS, positions_BS, positions_BS[:, None]),
        "use_cache": False,
    }


def text_config(model: Any) -> Any:
    """The config of a model's decoder; that of a model with images holds it as a part."""
    return model.config.get_text_config(decoder=True)


def _own(model: Any) -> Any:
    """The model itself, without adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_masks(model: Any) -> None:
    """Raises ModelError for a model whose layers or whose attention do not take masks made here."""
    config = text_config(model)
    if unknown := sorted(layer_types(model) - WITHIN.keys()):
        raise refusal(model, f"it has layers of type {', '.join(unknown)}")
    if getattr(config, "alibi", False):
        raise refusal(model, "it adds biases by place in the row, alibi, in place of positions")
    if "position_ids" not in signature(_own(model).forward).parameters:
        raise refusal(model, "it does not take position_ids")
    if config.model_type in REFUSED:
        raise refusal(model, REFUSED[config.model_type])
    if config._attn_implementation not in (EAGER, SDPA):
        raise refusal(model, f"its attention is {config._attn_implementation}, which takes no masks of trees")


def refusal(model: Any, reason: str) -> ModelError:
    """The error for a model that cannot be used here, of whatever kind."""
    return ModelError(
        f"a model of type {model.config.model_type!r} cannot be decoded here ({reason}): use one with full, "
        "sliding-window or chunked attention that accepts position_ids, or another as docs/models.md lists them"
    )


def _as_attention_expects(model: Any, mask_BTS: torch.Tensor) -> torch.Tensor:
    """Eager attention adds the mask to the scores, the other one takes booleans."""
    if text_config(model)._attn_implementation != EAGER:
        return mask_BTS
    return torch.zeros_like(mask_BTS, dtype=model.dtype).masked_fill(~mask_BTS, torch.finfo(model.dtype).min)
