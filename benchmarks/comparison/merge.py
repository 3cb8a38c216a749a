"""Low-rank adapters merged into the weights of the base model: one policy, or a weighted sum of several.

Rewarded Soups (arXiv 2306.04488) interpolate the weights of fine-tuned models, base + sum_m w_m delta_m. Here the full
differences delta_m = alpha / rank * B_m A_m are summed, in single precision, and rounded once. Interpolating A and B
themselves would add products of one policy's A and another one's B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"  # of peft's tensor names
Deltas = dict[str, torch.Tensor]  # name of a weight of the base model -> what is added to it, float32


def read_deltas(folder: Path) -> Deltas:
    """The differences of a stored adapter (adapter_config.json, adapter_model.safetensors)."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    return deltas_of(load_file(folder / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"])


def deltas_of(tensors: Mapping[str, torch.Tensor], scale: float) -> Deltas:
    """The differences of an adapter's tensors, as peft names them."""
    stems = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    return {
        f"{stem.removeprefix(PREFIX)}.weight": scale
        * (tensors[stem + LORA_B].detach().float() @ tensors[stem + LORA_A].detach().float())
        for stem in stems
    }


def weighted_sum(parts: Iterable[tuple[Deltas, float]]) -> Deltas:
    """The sum of several differences times their weights."""
    total: Deltas = {}
    for deltas, weight in parts:
        for name, delta in deltas.items():
            total[name] = total[name] + weight * delta if name in total else weight * delta
    return total


@torch.no_grad()
def add_deltas(model: nn.Module, deltas: Deltas) -> float:
    """Change a model's weights in place; the share of the differences, by norm, that rounding to the model's precision
    keeps, 1 in single precision.
    """
    weights = dict(model.named_parameters())
    wanted, kept = 0.0, 0.0
    for name, delta in deltas.items():
        weight = weights[name]
        before, delta = weight.float(), delta.to(weight.device)
        after = (before + delta).to(weight.dtype)
        wanted += float((delta * delta).sum())
        kept += float(((after.float() - before) * delta).sum())
        weight.copy_(after)
    return kept / wanted if wanted else 1.0
