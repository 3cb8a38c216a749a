"""Decoders for the slot cache: the portable path for any transformers decoder, and a faster one for Llama's family.

Shapes: B rows, T tokens of the longest row, N tokens of all rows side by side, R read tokens, H heads, D head size,
S visible cells, O outputs of the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis_dist.models.fused import FusedDecoder, linear_head
from mavis_dist.models.kv import Decoder, KVLayer, Step
from mavis_dist.models.value import ValueModel


def base_decoder(model: Any, portable: bool = False) -> Decoder:
    """Logits [R, V] of a causal language model, by the fastest path that its architecture has."""
    if not portable and FusedDecoder.supports(model.base_model):
        return FusedDecoder(model.base_model, linear_head(model.lm_head))
    return PortableDecoder(model.base_model, lambda **inputs: model(**inputs).logits)


def value_decoder(model: ValueModel, portable: bool = False) -> Decoder:
    """Values [R, O] in float32 of all heads of a value model."""
    if not portable and FusedDecoder.supports(model.backbone):
        return FusedDecoder(model.backbone, lambda hidden: model.heads(hidden.float()))
    return PortableDecoder(model.backbone, model)


class PortableDecoder:
    """Any decoder of transformers, through its own forward pass."""

    def __init__(self, backbone: PreTrainedModel, forward: Callable[..., torch.Tensor]):
        """`forward` has the interface of a Hugging Face decoder and returns head outputs [B, T, O]; `backbone` is the
        same model without the head, for tokens whose outputs nobody reads.
        """
        self._backbone, self._forward = backbone, forward
        self.device = backbone.device
        self.layers = [KVLayer() for _ in range(backbone.config.num_hidden_layers)]
        self._cached = [_PortableLayer(layer) for layer in self.layers]
        self._cache = Cache(layers=list(self._cached))

    def step(self, step: Step) -> torch.Tensor:
        for layer in self._cached:
            layer.step = step
        is_read = len(step.read_R) > 0
        run = self._forward if is_read else self._backbone
        out_BTO = run(
            input_ids=step.pad(step.tokens_N),
            position_ids=step.pad(step.positions_N),
            attention_mask=step.mask_BTS[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return step.unpad(out_BTO)[step.read_R] if is_read else torch.empty(0, 0, device=self.device)


class _PortableLayer(CacheLayerMixin):
    """A layer of the slot cache, as transformers calls it."""

    def __init__(self, layer: KVLayer):
        super().__init__()
        self._layer = layer
        self.step: Step | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The slot cache makes its tensors itself."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.step is not None
        keys_NHD, values_NHD = (self.step.unpad(x.transpose(1, 2)) for x in (key_states, value_states))
        return self._layer.write(self.step, keys_NHD, values_NHD)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.step is not None
        return self.step.num_visible, 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given explicitly

    def get_max_length(self) -> int:
        return -1
