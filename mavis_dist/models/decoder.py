"""Decoders over the slot cache: one for any transformers decoder, and a faster one for the Llama family.

Shapes: B rows, T tokens of the longest row, N tokens of all rows, concatenated, R read tokens, H heads, D head size,
S visible cells, O outputs of the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis_dist.models.cache import Decoder, KVCache, Step
from mavis_dist.models.fused import FusedDecoder, linear_head
from mavis_dist.models.masks import attention_masks, text_config
from mavis_dist.models.native import NativeDecoder, forward
from mavis_dist.models.packed import pack_linears, packed_head
from mavis_dist.models.qhead import Student
from mavis_dist.models.trial import try_model
from mavis_dist.models.value import ValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_decoder(model: Any, use_hf_forward: bool = False) -> Decoder:
    """Logits [R, V] of a causal language model, by the fastest decoder for its architecture."""
    if not use_hf_forward and NativeDecoder.supports(model.base_model):
        return NativeDecoder(model.base_model, logits=packed_head(model))
    if not use_hf_forward and FusedDecoder.supports(model.base_model):
        return FusedDecoder(model.base_model, linear_head(model.lm_head))
    return HFDecoder(model.base_model, lambda **inputs: model(**inputs).logits)


def value_decoder(model: ValueModel, use_hf_forward: bool = False) -> Decoder:
    """Values [R, O] in float32 of all heads of a value model."""
    if not use_hf_forward and NativeDecoder.supports(model.backbone):
        return NativeDecoder(model.backbone, values=model.heads)
    if not use_hf_forward and FusedDecoder.supports(model.backbone):
        return FusedDecoder(model.backbone, lambda hidden: model.heads(hidden.float()))
    return HFDecoder(model.backbone, model)


def update_values(decoder: Decoder, model: ValueModel) -> None:
    """Let a value decoder use the heads that its model has got since, for the rows as they are."""
    if isinstance(decoder, NativeDecoder):
        decoder.set_values(model.heads)


def student_decoder(student: Student, use_hf_forward: bool = False) -> Decoder:
    """Outputs [R, O] of a student, to be split by `Student.split`."""
    backbone = student.model.backbone
    if not use_hf_forward and NativeDecoder.supports(backbone):
        return NativeDecoder(backbone, read=states_reader(student))
    if not use_hf_forward and FusedDecoder.supports(backbone):
        return FusedDecoder(backbone, student.read)
    return HFDecoder(backbone, student)


def states_reader(student: Student) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a student makes of hidden states [R, C], by the fastest way there is."""
    if NativeDecoder.supports(student.model.backbone):
        pack_linears(student.qhead)
    return student.read


def step_all(decoders: Sequence[Decoder], steps: Sequence[Step]) -> list[torch.Tensor]:
    """The outputs of several decoders' steps, in one call where all are native."""
    native = [decoder for decoder in decoders if isinstance(decoder, NativeDecoder)]
    if len(native) == len(decoders) and len({decoder.dtype for decoder in native}) == 1:
        return forward(native, steps)
    return [decoder.step(step) for decoder, step in zip(decoders, steps, strict=True)]


class HFDecoder:
    """Any transformers decoder, through its own forward pass."""

    is_batch_invariant = False
    states: torch.Tensor | None = None

    def __init__(self, backbone: PreTrainedModel, forward: Callable[..., torch.Tensor]):
        """`forward` has the interface of a Hugging Face decoder and returns head outputs [B, T, O]; `backbone` is the
        same model without the head, for steps whose outputs are not read.

        Raises:
            ModelError: the model's layers or positions do not fit the slot cache.
        """
        try_model(backbone)
        self._backbone, self._forward, self.device = backbone, forward, backbone.device
        self.cache = KVCache(text_config(backbone).num_hidden_layers)
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
