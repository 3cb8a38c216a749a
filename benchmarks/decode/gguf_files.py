"""Writes a model as a GGUF file for llama.cpp, without its tokenizer: prompts come as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from mavis_dist.types import UserError

FAMILY = ("llama", "mistral")
BF16, Q8_0 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.Q8_0


def write(model: Path, file: Path, kind: gguf.GGMLQuantizationType) -> None:
    """`model` is a folder of safetensors; its matrices become `kind`, vectors stay float32.

    Raises:
        UserError: the model is not of a type that is written here.
    """
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] not in FAMILY:
        raise UserError(f"--peers: {model} is of type {config['model_type']}, llama.cpp is measured with {FAMILY} only")
    writer = gguf.GGUFWriter(file, "llama")
    _add_config(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _weights(model, config):
        tensor_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert tensor_name, f"llama.cpp has no name for {name}"
        if weight.ndim == 1:
            writer.add_tensor(tensor_name, weight)
        else:
            writer.add_tensor(tensor_name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _rope_theta(config: dict[str, Any]) -> float:
    return float(config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"])


def _weights(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Named weights in float32, the rotary halves of queries and keys interleaved as llama.cpp expects them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for part in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            weight = tensor.float().numpy()
            for projection, count in heads.items():
                if projection in name:
                    weight = weight.reshape(count, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
            yield name, weight
