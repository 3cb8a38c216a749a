"""Tiny random models of every causal language model that transformers knows, with windows of a few tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mavis_dist.models.directory import quiet
from mavis_dist.types import UserError

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY, BOS, EOS, PAD = 97, 1, 2, 0
WINDOW = 6  # tokens
MOST_PARAMETERS = 20_000_000
SCALE = 4.0  # of all weights: at its start a model hardly looks at what it reads

# Whatever of this a config has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "max_position_embeddings": 256,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "is_decoder": True,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
SOME_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}
# Latent attention: its sizes replace that of a head.
LATENT = {"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
LATENT_TYPES = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What some types need besides.
MORE: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3"), SOME_WINDOWS),
    **dict.fromkeys(LATENT_TYPES, LATENT),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "dots1": {"layer_types": ["full_attention", "sliding_attention"], "n_shared_experts": 1},
}
# Further models of these types, which differ in what matters here.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert, not causal": ("bert", {"is_decoder": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "gpt_neo, global layers only": ("gpt_neo", {"attention_types": [[["global"], 2]]}),
    "lfm2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "llama, a window in its config only": ("llama", {"sliding_window": WINDOW}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    **{
        f"{kind}, a window in one layer": (kind, {"layer_types": ["sliding_attention", "full_attention"]})
        for kind in ("cohere2", "exaone4", "gemma3_text", "olmo3")
    },
    "llama4_text, chunks in one layer": ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}),
}
NAMES = tuple(sorted({*TYPES, *VARIANTS}))


class NotTinyError(UserError):
    """An architecture that these sizes do not build."""


def tiny_model(name: str) -> PreTrainedModel:
    """A random causal language model with a peaked distribution; one of NAMES. Raises NotTinyError."""
    kind, fields = VARIANTS.get(name, (name, {}))
    try:
        with quiet():
            config = tiny_config(kind, fields)
            with torch.device("meta"):
                num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
            if num_parameters > MOST_PARAMETERS:
                raise NotTinyError(f"{num_parameters / 1e6:,.0f} million parameters")
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    except NotTinyError:
        raise
    # Whatever the code of an architecture raises about sizes that it does not fit.
    except Exception as error:
        raise _not_tiny(error) from error
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(SCALE)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_config(kind: str, fields: Mapping[str, Any]) -> Any:
    """A small configuration of a type, with `fields`."""
    known, more = CONFIG_MAPPING[kind], {**MORE.get(kind, {}), **fields}
    chosen = {key: size for key, size in SIZES.items() if _takes(known, key)} | more
    chosen = {key: size for key, size in chosen.items() if known.attribute_map.get(key) not in chosen or key in more}
    return AutoConfig.for_model(kind, **{k: v for k, v in chosen.items() if v is not None or k == "sliding_window"})


def runs(model: PreTrainedModel) -> None:
    """Raises NotTinyError if a model's own pass over a text fails: its sizes do not fit together."""
    try:
        model(input_ids=torch.arange(EOS + 1, EOS + 1 + 2 * WINDOW)[None])
    except Exception as error:
        raise _not_tiny(error) from error


def _not_tiny(error: Exception) -> NotTinyError:
    return NotTinyError(textwrap.shorten(f"{type(error).__name__}: {error}", 120))


def _takes(config_class: Any, key: str) -> bool:
    own = getattr(config_class, key, None)
    return key in config_class.attribute_map or (hasattr(config_class, key) and not isinstance(own, property))
