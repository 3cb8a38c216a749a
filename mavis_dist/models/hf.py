"""The forward pass of any transformers decoder over the slot cache.

Shapes: B rows, T tokens of the longest row, N tokens of all rows, concatenated, R read tokens, H heads, D head size,
S visible cells, O outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis_dist.models.cache import KVCache, Step
from mavis_dist.models.masks import attention_masks, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFDecoder:
    """Any transformers decoder, through its own forward pass."""

    is_batch_invariant = False
    states: torch.Tensor | None = None

    def __init__(self, backbone: PreTrainedModel, forward: Callable[..., torch.Tensor], cache: KVCache | None = None):
        """`forward` has the interface of a Hugging Face decoder and returns head outputs [B, T, O]; `backbone` is the
        same model without the head, for steps whose outputs are not read. Not every model decodes so; see `try_model`.
        `cache`: an empty one, for keys and values that others follow.
        """
        self._backbone, self._forward, self.device = backbone, forward, backbone.device
        self.cache = cache or KVCache(text_config(backbone).num_hidden_layers)
        self._cached = [_HFCacheLayer(self.cache, layer) for layer in range(self.cache.num_layers)]
        self._hf_cache = Cache(layers=list(self._cached))

    def step(self, step: Step) -> torch.Tensor:
        for layer in self._cached:
            layer.step = step
        is_read = len(step.read_R) > 0
        run = self._forward if is_read else self._backbone
        out_BTO = run(
            input_ids=step.pad(step.tokens_N),
            position_ids=step.pad(step.positions_N),
            attention_mask=attention_masks(
                self._backbone, step.mask_BTS, step.pad(step.positions_N), step.key_positions_BTS
            ),
            past_key_values=self._hf_cache,
            use_cache=True,
        )
        return step.unpad(out_BTO)[step.read_R] if is_read else torch.empty(0, 0, device=self.device)

    def read_states(self, layer: int | None) -> bool:
        return layer is None


class _HFCacheLayer(CacheLayerMixin):
    """A layer of the slot cache behind the interface of transformers' caches."""

    def __init__(self, cache: KVCache, layer: int):
        super().__init__()
        self._cache, self._layer = cache, layer
        self.step: Step | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The slot cache allocates its tensors itself."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.step is not None
        keys_NHD, values_NHD = (self.step.unpad(x.transpose(1, 2)) for x in (key_states, value_states))
        return self._cache.write(self._layer, self.step, keys_NHD, values_NHD)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.step is not None
        return self.step.num_visible, 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given explicitly

    def get_max_length(self) -> int:
        return -1
