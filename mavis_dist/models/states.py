"""The base model's own hidden states: its first layers and its final norm, over the base model's own weights.

A value model of kind `states` is a head on them. No second model is stored or held in memory.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from mavis_dist.models.directory import ModelError
from mavis_dist.models.native import NativeDecoder
from mavis_dist.models.packed import packed_head
from mavis_dist.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEPTH = 2 / 3  # of the layer that heads read by default: the last layers of a language model serve the next token only

_VIEWS: WeakKeyDictionary[nn.Module, dict[int, Any]] = WeakKeyDictionary()  # by decoder, then by number of layers
_LOCK = threading.Lock()


class StateLayerError(UserError):
    """A layer that the base model does not have."""


def state_layer(config: Any, chosen: int | None) -> int:
    """The number of layers behind the states that heads read, given `value.layers`; raises StateLayerError."""
    available = config.get_text_config().num_hidden_layers
    if chosen is not None and chosen > available:
        raise StateLayerError(
            f"value.layers is {chosen} but the base model has {available} layers: use at most {available}, or null"
        )
    return default_layer(available) if chosen is None else chosen


def default_layer(available: int) -> int:
    """The layer that heads read where `value.layers` is null, of so many."""
    return max(1, round(DEPTH * available))


def states_width(config: Any) -> int:
    """Channels of a decoder's output: OPT of 350 million parameters projects them to fewer than it computes with."""
    width: int = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return width


def truncate(config: Any, layers: int) -> None:
    """Cut a model configuration, and all of its lists by layer, to the first `layers` layers."""
    keep_layers(config, range(layers))


def keep_layers(config: Any, kept: Sequence[int]) -> None:
    """Cut a model configuration, and all of its lists by layer, to these layers."""
    available, config.num_hidden_layers = config.num_hidden_layers, len(kept)
    for name, entries in vars(config).items():
        if "layer" in name and isinstance(entries, list | tuple) and len(entries) == available:
            setattr(config, name, [entries[layer] for layer in kept])


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The first layers of a causal language model's decoder and its final norm, which share its weights.

    The same object in every call, so that all value models on it share a forward pass. Thread-safe.

    Raises:
        ModelError: the layers of this architecture cannot be found.
    """
    decoder: Any = model.base_model
    with _LOCK:
        views = _VIEWS.setdefault(decoder, {})
        if layers not in views:
            if NativeDecoder.supports(decoder):
                packed_head(model)  # first: it replaces a tied embedding by one that takes no memory
            views[layers] = view_of(decoder, layers)
        view: PreTrainedModel = views[layers]
        return view


def view_of(decoder: Any, layers: int) -> Any:
    """As `first_layers`, a new object for a decoder itself."""
    count = getattr(decoder.config, "num_hidden_layers", None)  # None: one with images
    named = decoder.named_children()
    names = [name for name, part in named if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(names) != 1:
        raise ModelError(
            f"the layers of a model of type {decoder.config.model_type!r} cannot be shared: choose another base model, "
            "or value.kind=model"
        )
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    view.config = copy.deepcopy(decoder.config)
    truncate(view.config, layers)
    setattr(view, names[0], decoder.get_submodule(names[0])[:layers])
    return view
