"""A faster forward pass for the Llama family: fewer, larger operations over the concatenated tokens of all rows.

Differs from the model's own forward pass in speed only: q, k and v are one product, gate and up are one, rows of
different lengths need no padding outside attention, queries of one key head are grouped instead of repeating keys and
values, and the head is computed only for tokens that are read.

Shapes: N tokens of all rows, concatenated, R read tokens, C channels, H heads, K key-value heads, G = H / K, D head
size, B rows, T tokens of the longest row, S visible cells, O outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mavis_dist.models.cache import KVCache, Step
from mavis_dist.models.masks import FULL, layer_types
from mavis_dist.models.replay import Replays

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED_FOR_ROWS = 64  # a hint to the kernel; any number of rows works
FAMILY = ("llama", "mistral", "qwen2")
# Without cuDNN's, which plans for a tenth of a second at every new shape.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ROTATIONS_BY_LENGTH = ("dynamic", "longrope")


class FusedDecoder:
    """Llama's forward pass over the slot cache."""

    is_batch_invariant = False

    def __init__(self, backbone: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor]):
        """`head` turns the last hidden states [R, C] into outputs [R, O]."""
        model: Any = backbone
        self._embed, self._rotary, self._norm, self._head = (
            model.embed_tokens,
            model.rotary_emb,
            _Norm(model.norm),
            head,
        )
        self._group = backbone.config.num_attention_heads // backbone.config.num_key_value_heads
        self._blocks = [_shared(layer, partial(_Block, layer, backbone.config)) for layer in model.layers]
        self.cache = KVCache(len(self._blocks), self._blocks[0].example)
        self.device = backbone.device
        self._replays = Replays(self.device)
        # Rotations that depend on the longest row make the host wait for its length.
        self._is_recorded = getattr(self._rotary, "rope_type", "default") not in ROTATIONS_BY_LENGTH
        self._generation = self.cache.generation
        self._state_layer: int | None = None
        self.states: torch.Tensor | None = None

    @staticmethod
    def supports(backbone: PreTrainedModel) -> bool:
        """Whether a model is of the family and uses only features that this forward pass implements."""
        config = backbone.config
        return config.model_type in FAMILY and config.hidden_act == "silu" and layer_types(backbone) == {FULL}

    def step(self, step: Step) -> torch.Tensor:
        layout, num_visible, num_cells = step.layout, step.num_visible, step.num_cells
        if self._generation != self.cache.generation:
            self._replays.clear()
            self._generation = self.cache.generation

        def read(slot_B: torch.Tensor, slot_N: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tokens_N, positions_N, cells_N, read_R = tensors
            moved = layout.at(slot_B, slot_N)
            return self._read(Step(moved, tokens_N, positions_N, cells_N, read_R, num_visible, num_cells))

        is_recorded = self._is_recorded and layout.is_static
        shape = len(layout.slots), layout.widths[0], layout.has_first_slots, num_visible, self._state_layer
        key = shape if is_recorded else None
        tensors = step.tokens_N, step.positions_N, step.cells_N, step.read_R
        # The head is left out: the logits of every recording would stay in memory.
        last_RC, *states = self._replays(key, read, layout.slot_B, layout.slot_N, *tensors)
        self.states = states[0] if states else None
        return self._head(last_RC)

    def read_states(self, layer: int | None) -> bool:
        self._state_layer, self.states = layer, None
        return True

    def _read(self, step: Step) -> tuple[torch.Tensor, ...]:
        """The last hidden states [R, C] of the tokens that are read, and those behind `state_layer` layers."""
        x_NC = self._embed(step.tokens_N)
        cos_1ND, sin_1ND = self._rotary(x_NC, step.positions_N[None])
        cos_N1D, sin_N1D = cos_1ND[0][:, None], sin_1ND[0][:, None]
        # Added, since attention would turn a boolean mask into one to be added in every layer.
        mask_BTS = torch.zeros_like(step.mask_BTS, dtype=x_NC.dtype).masked_fill_(~step.mask_BTS, float("-inf"))
        mask_B1QS = mask_BTS[:, :, None].expand(-1, -1, self._group, -1).flatten(1, 2)[:, None]
        states: list[torch.Tensor] = []
        with sdpa_kernel(ATTENTION):
            for layer, block in enumerate(self._blocks):
                x_NC = block(x_NC, cos_N1D, sin_N1D, mask_B1QS, self.cache, layer, step)
                if layer + 1 == self._state_layer:
                    states.append(self._norm(x_NC[step.read_R]))
        return self._norm(x_NC[step.read_R]), *states


# Objects that the decoders of one model share, by the module they were made from: a layer, or the output head.
_SHARED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _shared(module: nn.Module, make: Callable[[], Any]) -> Any:
    """Make it once per module: rearranged weights take memory."""
    if module not in _SHARED:
        _SHARED[module] = make()
    return _SHARED[module]


def linear_head(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear head that several decoders of one model share."""
    head: Linear = _shared(module, lambda: Linear(module))
    return head


class _Block:
    def __init__(self, layer: Any, config: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self._num_heads, self._num_kv, self._size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
        )
        self.example = attention.k_proj.weight.new_empty(self._num_kv, self._size)  # of a token's keys
        self._qkv = Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Linear(attention.o_proj)
        self._gate_up, self._down = Linear(mlp.gate_proj, mlp.up_proj), Linear(mlp.down_proj)
        self._norm_1, self._norm_2 = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)

    def __call__(
        self,
        x_NC: torch.Tensor,
        cos_N1D: torch.Tensor,
        sin_N1D: torch.Tensor,
        mask_B1QS: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Step,
    ) -> torch.Tensor:
        qkv_NHD = self._qkv(self._norm_1(x_NC)).unflatten(-1, (-1, self._size))
        rotated_NHD = _rotate(qkv_NHD[:, : self._num_heads + self._num_kv], cos_N1D, sin_N1D)
        keys_BKSD, values_BKSD = cache.write(
            layer, step, rotated_NHD[:, self._num_heads :], qkv_NHD[:, self._num_heads + self._num_kv :]
        )
        mixed_NC = self._attend(rotated_NHD[:, : self._num_heads], keys_BKSD, values_BKSD, mask_B1QS, step)
        x_NC = x_NC + self._out(mixed_NC)
        gate_NF, up_NF = self._gate_up(self._norm_2(x_NC)).chunk(2, -1)
        return x_NC + self._down(F.silu(gate_NF) * up_NF)

    def _attend(
        self,
        queries_NHD: torch.Tensor,
        keys_BKSD: torch.Tensor,
        values_BKSD: torch.Tensor,
        mask_B1QS: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """Attention [N, C]; the queries of one key head are rows of one product: [B, K, T * G, D]."""
        queries_BTKGD = step.pad(queries_NHD).unflatten(2, (self._num_kv, -1))
        longest, group = queries_BTKGD.shape[1], queries_BTKGD.shape[3]
        queries_BKQD = queries_BTKGD.transpose(1, 2).flatten(2, 3)
        mixed_BKQD = F.scaled_dot_product_attention(queries_BKQD, keys_BKSD, values_BKSD, attn_mask=mask_B1QS)
        mixed_BKTGD = mixed_BKQD.unflatten(2, (longest, group))
        return step.unpad(mixed_BKTGD.transpose(1, 2).flatten(2))


def _rotate(x_NHD: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves convention."""
    first, second = x_NHD.chunk(2, -1)
    return x_NHD * cos_N1D + torch.cat((-second, first), -1) * sin_N1D


class _Norm:
    """Root mean square normalisation in one operation."""

    def __init__(self, norm: Any):
        self._weight, self._epsilon = norm.weight, norm.variance_epsilon

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_NC, self._weight.shape, self._weight, self._epsilon)


class Linear:
    """Several linear maps of the same input as one.

    In bfloat16 on a CPU a second copy of the weight is kept in the kernel's own layout: otherwise oneDNN would reorder
    it on every call. Elsewhere the parts become views of the whole, which takes no extra memory.
    """

    def __init__(self, *parts: nn.Linear):
        self._weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
        self._bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self._packed: torch.Tensor | None = None
        if _can_pack(self._weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), _PACKED_FOR_ROWS)
            del self._weight
        elif len(parts) > 1:
            pieces = self._weight.split([part.out_features for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.weight.data = piece

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return F.linear(x_NC, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(x_NC, self._packed, self._bias, "none", [], "")


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
