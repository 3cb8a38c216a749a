"""Low-rank adapters merged into the weights of the base model: one policy, or a weighted sum of several.

Rewarded Soups (arXiv 2306.04488) interpolate the weights of fine-tuned models, base + sum_m w_m delta_m. Here the full
differences delta_m = alpha / rank * B_m A_m are summed in single precision and added once. Interpolating A and B
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
ADAPTER_FILES = SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's
Deltas = dict[str, torch.Tensor]  # name of a weight of the base model -> what is added to it, float32


def read_deltas(folder: Path) -> Deltas:
    """The differences of a stored adapter."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    return deltas_of(load_file(folder / WEIGHTS_FILE), settings["lora_alpha"] / settings["r"])


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
def add_deltas(model: nn.Module, deltas: Deltas) -> None:
    """Change a model's weights in place.

    Differences may be smaller than the steps of bfloat16, and rounding to the nearest would drop them. They are rounded
    up or down at random, always in the same way on a kind of device: right on average, and exact where the difference
    is 0.
    """
    weights = dict(model.named_parameters())
    sources: dict[torch.device, torch.Generator] = {}
    for name, delta in deltas.items():
        weight = weights[name]
        changed = weight.float() + delta.to(weight.device)
        if weight.dtype == torch.bfloat16:
            source = sources.setdefault(weight.device, torch.Generator(weight.device).manual_seed(0))
            changed = _rounded_at_random(changed, source)
        weight.copy_(changed)


def _rounded_at_random(x: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """One of the two neighbours in bfloat16, which are the upper 16 bits of a float32, with the right mean."""
    lower = torch.randint(1 << 16, x.shape, dtype=torch.int32, generator=source, device=x.device)
    return ((x.view(torch.int32) + lower) & -(1 << 16)).view(torch.float32)
