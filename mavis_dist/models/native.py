"""The decoder around the native forward pass.

Shapes: N tokens of all rows, concatenated, R read tokens, C channels, L layers, K key-value heads, D head size, P
positions, V vocabulary, M value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mavis_dist.models.cache import KVCache, Step
from mavis_dist.models.masks import FULL, layer_types
from mavis_dist.models.packed import WIDTH, PackedEmbedding, PackedLinear, is_packable, packed_layers
from mavis_dist.native import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
HEAD_SIZES = (64, 96, 128)
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that do not depend on the length of a row
POSITIONS_PER_GROWTH = 1024


class NativeDecoder:
    """Llama's forward pass over the slot cache, in one call."""

    is_batch_invariant = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        logits: PackedLinear | None = None,
        values: nn.Linear | None = None,
        read: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        """Outputs are those of one head: logits, or values in single precision, or what `read` makes of the last hidden
        states.
        """
        model: Any = backbone
        config = backbone.config
        attention = model.layers[0].self_attn
        self._rotary, self.dtype = model.rotary_emb, backbone.dtype
        self._angles = torch.empty(0, 2, attention.head_dim // 2)
        embedding = model.embed_tokens
        is_packed = isinstance(embedding, PackedEmbedding)
        self._native = _model(model, embedding.packed if is_packed else embedding.weight.detach().contiguous())
        self.read = read
        if logits is not None:
            self._native.set_head(logits.packed, logits.bias, logits.out_features)
        if values is not None:
            self.set_values(values)
        like = torch.empty(config.num_key_value_heads, attention.head_dim, dtype=backbone.dtype)
        self.cache, self.device = KVCache(len(model.layers), like, is_masked=False), backbone.device
        self.state_layer: int | None = None
        self.states: torch.Tensor | None = None

    @staticmethod
    def supports(backbone: PreTrainedModel) -> bool:
        """Whether the native pass implements everything that a model uses, and this machine has it."""
        config: Any = backbone.config
        if config.model_type not in FAMILY or backbone.device.type != "cpu" or not _multiplies(backbone.dtype):
            return False
        rope = getattr(config, "rope_parameters", None) or {}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return (
            config.hidden_act == "silu"
            and layer_types(backbone) == {FULL}
            and rope.get("rope_type", "default") in STATIC_ROTATIONS
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and size in HEAD_SIZES
            and config.hidden_size % WIDTH == config.intermediate_size % WIDTH == 0
            and is_packable(backbone)
            and build.is_loaded()
        )

    def set_values(self, values: nn.Linear) -> None:
        """Replace the value heads."""
        self._native.set_values(values.weight.detach().contiguous(), values.bias.detach().contiguous())

    def read_states(self, layer: int | None) -> bool:
        self.state_layer, self.states = layer, None
        self._native.set_state_layer(layer or 0)
        return True

    def step(self, step: Step) -> torch.Tensor:
        [out_RO] = forward([self], [step])
        return out_RO

    def angles(self, num_positions: int) -> torch.Tensor:
        """Cosines and sines of at least so many positions, [P, 2, D / 2], rounded as the model rounds them."""
        if num_positions > len(self._angles):
            count = -(-num_positions // POSITIONS_PER_GROWTH) * POSITIONS_PER_GROWTH
            like = torch.empty(1, dtype=self.dtype)
            tables = self._rotary(like, torch.arange(count)[None])
            self._angles = torch.stack([table[0].float().chunk(2, -1)[0] for table in tables], 1).contiguous()
        return self._angles


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a kernel for packed weights of this type here."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


def forward(decoders: Sequence[NativeDecoder], steps: Sequence[Step]) -> list[torch.Tensor]:
    """The outputs of several decoders' steps in one call."""
    outputs: list[torch.Tensor] = torch.ops.mavis.forward(
        [decoder._native for decoder in decoders],
        [torch.stack([step.tokens_N, step.positions_N, step.cells_N, step.slot_N]) for step in steps],
        [step.read_R for step in steps],
        [decoder.cache.storage for decoder in decoders],
        [decoder.angles(step.num_visible) for decoder, step in zip(decoders, steps, strict=True)],
    )
    states = iter(outputs[len(decoders) :])
    for decoder in decoders:
        decoder.states = next(states) if decoder.state_layer else None
    pairs = zip(decoders, outputs, strict=False)
    return [decoder.read(out) if decoder.read else out for decoder, out in pairs]


def _model(backbone: Any, embedding: torch.Tensor) -> Any:
    """A native model without a head."""
    config, attention = backbone.config, backbone.layers[0].self_attn
    native = torch.classes.mavis.Model(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        config.rms_norm_eps,
        attention.scaling,
        embedding,
        backbone.norm.weight.detach(),
    )
    for layer in packed_layers(backbone):
        parts = (layer.qkv, layer.out, layer.gate_up, layer.down)
        native.add_layer([p.packed for p in parts], [p.bias for p in parts], layer.norms, layer.rotates)
    return native
