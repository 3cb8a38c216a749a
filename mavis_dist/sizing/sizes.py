"""Sizes of language models, from their configs alone: no weights are read.

Models are built on torch's device `meta`, where tensors have shapes only, so that every architecture is counted as it
is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mavis_dist.sections import NAMED_MODELS
from mavis_dist.types import UserError, one_line

LAYER = re.compile(r"\.(\d+)\.")

# Llama-like models by the names of their sizes: TinyLlama, Llama 2 of three sizes.
SHAPES: dict[str, dict[str, int]] = {
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    for name, layers, hidden, heads, key_heads, inner in (
        ("1b", 22, 2048, 32, 4, 5632),
        ("7b", 32, 4096, 32, 32, 11008),
        ("13b", 40, 5120, 40, 40, 13824),
        ("70b", 80, 8192, 64, 8, 28672),
    )
}


@dataclass(frozen=True)
class Size:
    """Parameters of a decoder, and widths that decide what else it needs."""

    layers: int
    hidden: int
    inner: int  # width of the middle of a layer's feed-forward part
    vocabulary: int
    embedding: int  # parameters of token embeddings
    head: int  # of the output; 0 if it is the embedding, or there is none
    matrices: float  # of a layer's matrices, the mean over layers
    rest: float  # of the norms, and all else that is in every process of a group
    key_heads: int  # that a group's processes share out
    channels: float  # of keys, and as many of values, of a token in a layer
    is_tied: bool = False  # the output multiplies with the embedding
    inputs_outputs: float = 0.0  # widths of input and output of a layer's matrices, summed: parameters per LoRA rank

    @property
    def num_parameters(self) -> int:
        return round(self.embedding + self.head + self.layers * self.matrices + self.rest)

    @property
    def num_multiplied(self) -> float:
        """Parameters that a step of the decoder multiplies with."""
        return self.layers * self.matrices + (self.embedding if self.is_tied else self.head)

    def weight_bytes(self, width: int, num_shards: int = 1) -> float:
        """Of one process of a group; matrices, embeddings and output are shared out, norms are not."""
        shared = self.layers * self.matrices + self.embedding + self.head
        return width * (shared / num_shards + self.num_parameters - shared)

    def token_bytes(self, width: int, num_shards: int = 1) -> float:
        """Keys and values of one token in all layers, in one process of a group."""
        return 2 * self.layers * self.channels * width / num_shards

    def backbone(self, layers: int | None = None) -> Size:
        """The first layers, without an output, as value models have them.

        Raises:
            UserError: there are fewer layers.
        """
        if layers is not None and layers > self.layers:
            raise UserError(f"value.layers is {layers} but the backbone has {self.layers} layers: use at most as many")
        return replace(self, layers=layers or self.layers, head=0, is_tied=False)


def shape_size(name: str) -> Size:
    """The size of one of SHAPES; raises UserError."""
    if name not in SHAPES:
        raise UserError(f"the shape {name!r} is unknown, use one of {', '.join(SHAPES)}")
    from transformers import LlamaConfig

    return size_of(LlamaConfig(**SHAPES[name]))  # type: ignore[arg-type]


def read_size(name: str) -> Size:
    """The size of a model by name, as `models.fetch` has it; of a directory or hub id only config.json is read.

    Raises:
        UserError: it cannot be read.
    """
    from mavis_dist.models.directory import read_config
    from mavis_dist.models.fetch import fetch

    path = Path(name).expanduser()
    if path.is_dir():
        return size_of(read_config(path))
    if name in NAMED_MODELS or path.suffix == ".gguf":
        return size_of(read_config(fetch(name)))
    from transformers import AutoConfig

    try:
        return size_of(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the config of model {name!r} cannot be read ({one_line(error, 80)}): give a local directory, or "
            f"--shape and --value-shape with one of {', '.join(SHAPES)}"
        ) from None


def size_of(config: Any) -> Size:
    """The size of the model that a transformers config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    from mavis_dist.models.directory import WITHOUT_WEIGHTS, quiet

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **WITHOUT_WEIGHTS)
    text = config.get_text_config(decoder=True)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = inputs is outputs
    in_layers = [p for name, p in model.named_parameters() if LAYER.search(name)]
    matrices = [p for p in in_layers if p.dim() > 1]
    layers, num_matrices = text.num_hidden_layers, sum(p.numel() for p in matrices)
    head = 0 if is_tied else outputs.numel()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Size(
        layers=layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        embedding=inputs.numel(),
        head=head,
        matrices=num_matrices / layers,
        rest=model.num_parameters() - num_matrices - head - inputs.numel(),
        key_heads=heads,
        channels=heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        is_tied=is_tied,
        inputs_outputs=sum(sum(p.shape) for p in matrices) / layers,
    )
