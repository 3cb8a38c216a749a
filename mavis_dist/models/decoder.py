"""Decoders over the slot cache: one for any transformers decoder, and a faster one for the Llama family.

Shapes: R read tokens, O outputs of the head, V vocabulary, B texts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mavis_dist.models.cache import Decoder, Step
from mavis_dist.models.fused import FusedDecoder, linear_head
from mavis_dist.models.hf import HFDecoder
from mavis_dist.models.lockstep import leader_of
from mavis_dist.models.native import NativeDecoder, forward
from mavis_dist.models.packed import pack_linears, packed_head
from mavis_dist.models.qhead import Student
from mavis_dist.models.trial import try_model
from mavis_dist.models.value import ValueModel


def base_decoder(model: Any, use_hf_forward: bool = False) -> Decoder:
    """Logits [R, V] of a causal language model, by the fastest decoder for its architecture."""
    if (leader := leader_of(model)) is not None:
        return leader.decoder(model, lambda **inputs: model(**inputs).logits)
    if not use_hf_forward and NativeDecoder.supports(model.base_model):
        return NativeDecoder(model.base_model, logits=packed_head(model))
    if not use_hf_forward and FusedDecoder.supports(model.base_model):
        return FusedDecoder(model.base_model, linear_head(model.lm_head))
    return _hf_decoder(model.base_model, lambda **inputs: model(**inputs).logits)


@torch.inference_mode()
def text_logits(model: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] of a causal language model for whole texts, without a cache."""
    if (leader := leader_of(model)) is not None:
        return leader.logits(ids_BL)
    found: torch.Tensor = model(input_ids=ids_BL.to(model.device)).logits
    return found


def value_decoder(model: ValueModel, use_hf_forward: bool = False) -> Decoder:
    """Values [R, O] in float32 of all heads of a value model."""
    if (leader := leader_of(model.backbone)) is not None:
        return leader.decoder(model.backbone, model)
    if not use_hf_forward and NativeDecoder.supports(model.backbone):
        return NativeDecoder(model.backbone, values=model.heads)
    if not use_hf_forward and FusedDecoder.supports(model.backbone):
        return FusedDecoder(model.backbone, lambda hidden: model.heads(hidden.float()))
    return _hf_decoder(model.backbone, model)


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
    return _hf_decoder(backbone, student)


def states_reader(student: Student) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a student makes of hidden states [R, C], by the fastest way there is."""
    if NativeDecoder.supports(student.model.backbone):
        pack_linears(student.qhead)
    return student.read


def _hf_decoder(backbone: Any, forward: Callable[..., torch.Tensor]) -> HFDecoder:
    """Raises ModelError: the model's layers or positions do not fit the slot cache."""
    try_model(backbone)
    return HFDecoder(backbone, forward)


def step_all(decoders: Sequence[Decoder], steps: Sequence[Step]) -> list[torch.Tensor]:
    """The outputs of several decoders' steps, in one call where all are native."""
    native = [decoder for decoder in decoders if isinstance(decoder, NativeDecoder)]
    if len(native) == len(decoders) and len({decoder.dtype for decoder in native}) == 1:
        return forward(native, steps)
    return [decoder.step(step) for decoder, step in zip(decoders, steps, strict=True)]
