"""Both decoders against transformers' generate: architectures, windows, rotary embeddings, biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.directory import ModelError
from mavis_dist.models.fused import FusedDecoder
from tests.fakes import EOS, LLAMA3, VOCAB, peaked, tiny_base

MAX_TOKENS = 12
PROMPTS = [(5, 6, 7), tuple(range(10, 19)), tuple(range(90, 60, -1)), (8,)]
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
FUSED = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, a key head each": ("llama", {"num_key_value_heads": 4}),
    "llama, llama3 rotation": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rotation": ("llama", {"rope_parameters": LINEAR}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}
OTHER = {
    "mistral with window": ("mistral", {"sliding_window": 6}),
    "qwen2, some windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2, eager attention": ("gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3, windows": ("gemma3_text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "llama with another activation": ("llama", {"hidden_act": "gelu"}),
}


def tiny(kind: str, **fields) -> PreTrainedModel:
    """A random model of some architecture, with a peaked distribution and nonzero biases."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | fields)).float().eval()
    return peaked(model, 4.0)


def generated(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=1,
        max_new_tokens=MAX_TOKENS,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def written(kind: str, fields: dict[str, Any]) -> tuple[PreTrainedModel, list[list[int]]]:
    """A tiny model, and what transformers generates with it: varied tokens."""
    model = tiny(kind, **fields)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 5
    return model, expected


def decoded(model: PreTrainedModel, use_hf_forward: bool) -> list[list[int]]:
    """All prompts in one batch, in small pieces, so that every kind of pass has rows of different lengths."""
    engine = Engine(replace(tiny_base(), model=model), prefill_tokens=7, use_hf_forward=use_hf_forward)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    requests = [Request(str(i), prompt, params=params) for i, prompt in enumerate(PROMPTS)]
    return [choice.tokens for [choice] in engine.generate(requests)]


@pytest.mark.parametrize("name", list(FUSED))
def test_the_fused_decoder_and_the_hf_decoder_match_transformers(name):
    model, expected = written(*FUSED[name])
    assert isinstance(base_decoder(model), FusedDecoder)
    assert decoded(model, use_hf_forward=True) == expected
    assert decoded(model, use_hf_forward=False) == expected


@pytest.mark.parametrize("name", list(OTHER))
def test_other_models_use_the_hf_decoder_and_match_transformers(name):
    """Prompts and answers are several times as long as the windows."""
    model, expected = written(*OTHER[name])
    assert not FusedDecoder.supports(model.base_model)
    assert decoded(model, use_hf_forward=False) == expected


@pytest.mark.parametrize("name", ["qwen2", "qwen2, some windows", "gemma2, eager attention", "gpt_neox"])
def test_answers_of_any_architecture_do_not_depend_on_neighbours(name):
    kind, fields = (FUSED | OTHER)[name]
    base = replace(tiny_base(), model=tiny(kind, **fields))
    requests = [
        Request(str(i), prompt, params=SamplingParams(max_tokens=MAX_TOKENS, seed=i, n=2))
        for i, prompt in enumerate(PROMPTS)
    ]
    together = Engine(base, max_rows=3, prefill_tokens=5).generate(requests)
    for choices, request in zip(together, requests, strict=True):
        [alone] = Engine(base, max_rows=1).generate([request])
        assert [choice.tokens for choice in choices] == [choice.tokens for choice in alone]


def test_an_unsupported_model_is_rejected_with_its_type():
    """Bloom's attention takes its positions from the mask."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=1))
    with pytest.raises(ModelError, match="'bloom'"):
        base_decoder(model)


def test_a_fused_decoder_does_not_change_the_model():
    """Parts become views of the whole: weights and the model's own forward pass stay the same."""
    model, ids = tiny("llama", attention_bias=True), torch.tensor([PROMPTS[1]])
    weights, logits = {name: w.clone() for name, w in model.state_dict().items()}, model(input_ids=ids).logits
    base_decoder(model)
    base_decoder(model)
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, logits)
