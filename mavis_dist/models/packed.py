"""Weights in the order in which the native kernel reads them, held once: a model's own modules read them as well.

Shapes: P panels, K inputs, W columns of a panel, E numbers that lie together (2 in bfloat16, 1 in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mavis_dist.native.memory import Arena

WIDTH, PAIRED_WIDTH = 32, 64  # columns of a panel; of gate and up together, half of them each


def pack(weight: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    """A weight [outputs, K] as [P, K / E, W, E]; the last panel is filled up with zeros."""
    outputs, inputs = weight.shape
    together = 2 if weight.dtype == torch.bfloat16 else 1
    padded = nn.functional.pad(weight.detach(), (0, 0, 0, -outputs % width))
    return padded.view(-1, width, inputs // together, together).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """The weight [outputs, K] that `pack` was given."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs]


class PackedLinear(nn.Module):
    """A linear map whose weight is packed."""

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int):
        super().__init__()
        self.packed, self.bias = packed, bias
        self.in_features, self.out_features = packed.shape[1] * packed.shape[3], outputs

    @property
    def weight(self) -> torch.Tensor:
        """A copy [outputs, K]."""
        return unpack(self.packed, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = torch.ops.mavis.linear(
            x.reshape(-1, self.in_features).contiguous(), self.packed, self.bias, self.out_features
        )
        return rows.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


class PackedEmbedding(nn.Module):
    """An embedding that is tied to a packed output head."""

    def __init__(self, head: PackedLinear):
        super().__init__()
        self.packed, self._num = head.packed, head.out_features

    @property
    def weight(self) -> torch.Tensor:
        """A copy [V, K]."""
        return unpack(self.packed, self._num)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed[ids // WIDTH, :, ids % WIDTH].flatten(-2)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight


@dataclass(frozen=True)
class Joint:
    """Several linear maps of the same input as one."""

    packed: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """A layer's weights as `Model::add_layer` in forward.cpp takes them."""

    qkv: Joint
    out: Joint
    gate_up: Joint
    down: Joint
    norms: list[torch.Tensor | None]  # before attention and after; of queries and keys, where there are any
    rotates: bool


# By the module that they were made from: decoders of one model share them, also those of its first layers only.
_LAYERS: WeakKeyDictionary[nn.Module, Layer] = WeakKeyDictionary()
_HEADS: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()


PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def is_packable(backbone: Any) -> bool:
    """Whether all linear maps of a decoder are plain ones: those of adapters and quantised models are not."""
    # A copy of a packed model has packed ones.
    return all(type(part) in (nn.Linear, PackedLinear) for part in _projections(backbone.layers))


def packed_layers(backbone: Any) -> list[Layer]:
    """The packed layers of a decoder."""
    missing = [layer for layer in backbone.layers if layer not in _LAYERS]
    if missing:
        parts = _projections(missing)
        num_weights = sum(part.in_features * part.out_features for part in parts)
        arena = Arena(num_weights * backbone.dtype.itemsize, len(parts))
        _LAYERS.update((layer, _packed_layer(layer, arena)) for layer in missing)
    return [_LAYERS[layer] for layer in backbone.layers]


def _projections(layers: Iterable[Any]) -> list[Any]:
    return [
        getattr(getattr(layer, part), name) for layer in layers for part, names in PROJECTIONS.items() for name in names
    ]


def packed_head(model: Any) -> PackedLinear:
    """The packed output head of a causal language model; a tied embedding reads it as well."""
    head, embedding = model.lm_head, model.get_input_embeddings()
    if isinstance(head, PackedLinear):
        return head
    if head not in _HEADS:
        packed = pack(head.weight)
        packed = Arena(packed.nbytes, 1).put(packed)
        _HEADS[head] = PackedLinear(packed, _detached(head.bias), head.out_features)
        is_tied = embedding.weight is head.weight
        if _replace(model, "lm_head", _HEADS[head]) and is_tied:
            model.set_input_embeddings(PackedEmbedding(_HEADS[head]))
    return _HEADS[head]


def pack_linears(module: nn.Module) -> None:
    """Pack all linear maps of a module, so that a row's result does not depend on the number of rows."""
    for owner in list(module.modules()):
        for name, part in list(owner.named_children()):
            if type(part) is nn.Linear and not part.in_features % 2:
                _replace(owner, name, PackedLinear(pack(part.weight), _detached(part.bias), part.out_features))


def _packed_layer(layer: Any, arena: Arena) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return Layer(
        _joint(arena, attention, "q_proj", "k_proj", "v_proj"),
        _joint(arena, attention, "o_proj"),
        _paired(arena, mlp, "gate_proj", "up_proj"),
        _joint(arena, mlp, "down_proj"),
        [None if norm is None else norm.weight.detach() for norm in norms],
        bool(getattr(attention, "use_rope", True)),
    )


def _joint(arena: Arena, owner: nn.Module, *names: str) -> Joint:
    """Linear maps one after the other."""
    sizes = [getattr(owner, name).out_features // WIDTH for name in names]
    return _packed(arena, owner, names, torch.cat, WIDTH, lambda packed: packed.split(sizes))


def _paired(arena: Arena, owner: nn.Module, *names: str) -> Joint:
    """Two linear maps in turn, half a panel each."""
    return _packed(arena, owner, names, _in_turn, PAIRED_WIDTH, lambda packed: packed.chunk(2, 2))


def _packed(
    arena: Arena,
    owner: nn.Module,
    names: Sequence[str],
    join: Callable[[list[torch.Tensor]], torch.Tensor],
    width: int,
    divide: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Joint:
    """Linear maps as one, and each of them as its part of it; `divide` undoes `join` once it is packed."""
    parts: list[Any] = [getattr(owner, name) for name in names]
    packed = arena.put(pack(join([part.weight for part in parts]), width))
    for name, part, own in zip(names, parts, divide(packed), strict=True):
        _replace(owner, name, PackedLinear(own, _detached(part.bias), part.out_features))
    return Joint(packed, None if parts[0].bias is None else join([part.bias.detach() for part in parts]))


def _in_turn(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.unflatten(0, (-1, PAIRED_WIDTH // 2)) for part in parts], 1).flatten(0, 2)


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def _replace(owner: nn.Module, name: str, packed: PackedLinear) -> bool:
    """Let a module read the packed weight instead of its own, unless it may be trained."""
    is_frozen = not any(parameter.requires_grad for parameter in getattr(owner, name).parameters())
    if is_frozen:
        setattr(owner, name, packed)
    return is_frozen
