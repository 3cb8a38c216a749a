"""Tiny random models for fast tests: real transformers decoders, real heads, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

from mavis_dist.decode import GuideRow, LocalGuide
from mavis_dist.models.load import BaseModel
from mavis_dist.models.qhead import QHead, Student
from mavis_dist.models.states import first_layers
from mavis_dist.models.value import ValueModel

VOCAB, EOS = 97, 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


class Letters:
    """A tokenizer that only decodes: one character per token, none for the end-of-answer token."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(ord(" ") + token) for token in ids if token != EOS)


class CountingGuide(LocalGuide):
    """Records the rows that it follows, and counts kept candidates and encoded tokens."""

    def __init__(self, models: Mapping[str, ValueModel]):
        super().__init__(models)
        self.rows: set[int] = set()
        self.num_kept, self.num_read, self.num_from_start = 0, 0, 0

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        self.rows |= {row.row for row in rows}
        self.num_read += sum(len(row.tokens) - row.shared for row in rows)
        self.num_from_start += sum(row.source is None for row in rows)
        return super().open(rows)

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        self.num_kept += len(rows)
        super().keep(rows, index_B)

    def close(self, rows: Sequence[int]) -> None:
        self.rows.difference_update(rows)
        super().close(rows)


def peaked(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """The model with a peaked distribution, nonzero biases, and no gradients."""
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_config(layers: int = 2, vocab: int = VOCAB, head_size: int = 8) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=max(48, head_size),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=1,
    )


def tiny_base(seed: int = 0, eos_boost: float = 0.0, head_size: int = 8) -> BaseModel:
    """A two-layer Llama; with `eos_boost` > 0 answers end sooner, with heads of 64 it is decoded natively."""
    torch.manual_seed(seed)
    config = tiny_config(head_size=head_size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    model.requires_grad_(False)
    model.lm_head.weight.mul_(4.0)  # a peaked distribution
    model.lm_head.weight[EOS] += eos_boost * torch.randn(32)
    return BaseModel(
        model=model,
        tokenizer=cast(PreTrainedTokenizerFast, Letters()),
        name="tiny",
        fingerprint="tiny-base",
        tokenizer_fingerprint="tiny-tokenizer",
        eos_ids=(EOS,),
        max_context=256,
    )


def tiny_value(
    seed: int, num_objectives: int = 1, layers: int = 1, scale: float = 0.5, vocab: int = VOCAB, head_size: int = 8
) -> ValueModel:
    torch.manual_seed(seed)
    backbone = LlamaModel._from_config(tiny_config(layers, vocab, head_size), attn_implementation="sdpa")
    model = ValueModel(backbone, num_objectives)
    torch.nn.init.normal_(model.heads.weight, std=scale)
    return model.eval().requires_grad_(False)


def tiny_states(base: BaseModel, seed: int, num_objectives: int = 1, layer: int = 1, scale: float = 0.5) -> ValueModel:
    """Heads on the states of a base model."""
    torch.manual_seed(seed)
    model = ValueModel(first_layers(base.model, layer), num_objectives)
    torch.nn.init.normal_(model.heads.weight, std=scale)
    return model.eval().requires_grad_(False)


def tiny_states_student(base: BaseModel, seed: int, num_objectives: int = 1, layer: int = 1, rank: int = 4) -> Student:
    """A student on the states of a base model."""
    model = tiny_states(base, seed, num_objectives, layer)
    qhead = QHead(32, num_objectives, rank)
    for query in qhead.queries:
        torch.nn.init.normal_(query.get_parameter("weight"), std=0.5)
    return Student(model, qhead, layer).eval().requires_grad_(False)


def tiny_student(seed: int, num_objectives: int = 1, layers: int = 1, rank: int = 4, head_size: int = 8) -> Student:
    model = tiny_value(seed, num_objectives, layers, head_size=head_size)
    qhead = QHead(32, num_objectives, rank)
    for query in qhead.queries:
        torch.nn.init.normal_(query.get_parameter("weight"), std=0.5)
    return Student(model, qhead).eval().requires_grad_(False)
