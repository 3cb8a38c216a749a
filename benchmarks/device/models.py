"""Models with random weights, made on the device itself, that behave as trained ones do where speed depends on it.

The distribution of the next token is as peaked, and tilts are as large, as with trained models: both decide how many
candidates the `lazy` scorer evaluates. No answer ends early.

Shapes: B rows, T tokens, X positions, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from mavis_dist.models.load import BaseModel
from mavis_dist.models.value import ValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, FIRST_TOKEN = 0, 2, 3  # ordinary tokens are those from the first one on
MAX_CONTEXT = 2048
WEIGHT_BYTES = 2  # of bfloat16
VALUE_LAYERS = 4
TOP_K = 40
ENTROPY = 1.75  # nats, mean over the tokens of answers, among the TOP_K most likely ones
BETA, TILT_SD = 8.0, 1.0  # nats: standard deviation of the tilt of two objectives over random tokens
SEARCHED_SCALES, SEARCH_STEPS = (1e-2, 1e3), 40
ROUNDS, ROWS_LOOKED_AT, PROMPT_LOOKED_AT, ANSWER_LOOKED_AT = 2, 8, 32, 32  # for the entropy


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of Llama's architecture."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    is_tied: bool

    @property
    def num_weights(self) -> int:
        """Weights that a step multiplies with: all but token embeddings."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocabulary

    @property
    def num_parameters(self) -> int:
        """Without those of the norms."""
        return self.num_weights + (0 if self.is_tied else self.hidden * self.vocabulary)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_size * WEIGHT_BYTES

    def config(self, layers: int | None = None) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            max_position_embeddings=MAX_CONTEXT,
            tie_word_embeddings=self.is_tied,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=EOS,
        )


SHAPES = {
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, is_tied=True),
    "7b": Shape(32, 4096, 32, 8, 128, 14336, 32000, is_tied=False),
    "tiny": Shape(2, 64, 4, 2, 16, 128, 512, is_tied=True),
}

Guided = Mapping[str, "tuple[ValueModel, int]"]  # objective -> value model and head


class Characters:
    """A tokenizer that only decodes: one character per token."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "x" * len(ids)


@dataclass(frozen=True)
class Models:
    """A base model, and the value models of two objectives."""

    shape: Shape
    base: BaseModel
    separate: Guided  # a value model for each of the objectives
    shared: Guided  # one with two heads


def load(shape: Shape, device: torch.device) -> Models:
    """All models of a shape in bfloat16; those of the same width share nothing but the heads' backbone."""
    torch.manual_seed(0)
    base = base_model(shape, device)
    first, second = (value_model(shape, device, torch.bfloat16) for _ in range(2))
    both = with_heads(first.backbone, device, 2)
    return Models(shape, base, {"a": (first, 0), "b": (second, 0)}, {"a": (both, 0), "b": (both, 1)})


def base_model(shape: Shape, device: torch.device) -> BaseModel:
    """With the entropy ENTROPY, and an end-of-answer token that is never among the candidates."""
    with device:
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    spread(model).eval().requires_grad_(False)
    model.lm_head.weight[EOS] = 0.0  # a logit of 0, which is far below the largest
    peak(model)
    return BaseModel(
        model=model,
        tokenizer=cast("PreTrainedTokenizerBase", Characters()),
        name="random",
        fingerprint="random",
        tokenizer_fingerprint="random",
        eos_ids=(EOS,),
        max_context=MAX_CONTEXT,
    )


@torch.no_grad()
def spread(model: Any) -> Any:
    """The model with embeddings of standard deviation 1: with smaller ones the last token would hardly matter."""
    model.get_input_embeddings().weight.mul_(1 / model.config.initializer_range)
    return model


@torch.no_grad()
def peak(model: Any) -> None:
    """Scale the states that the head reads, until answers have the entropy.

    Signs are mixed: otherwise a head that is tied to the embeddings would predict the token that it has just read.
    """
    norm = model.model.norm.weight
    norm.copy_(torch.randint(0, 2, norm.shape, device=norm.device) * 2 - 1)
    shape = (ROWS_LOOKED_AT, PROMPT_LOOKED_AT)
    prompts_BT = torch.randint(FIRST_TOKEN, model.config.vocab_size, shape, device=norm.device)
    norm.mul_(_scale(top_logits(model, prompts_BT, PROMPT_LOOKED_AT // 2)))
    for _ in range(ROUNDS):  # answers change with the scale
        tokens_BT = sample(model, prompts_BT, torch.ones_like(prompts_BT), ANSWER_LOOKED_AT)
        norm.mul_(_scale(top_logits(model, tokens_BT, ANSWER_LOOKED_AT)))


def _scale(logits_XK: torch.Tensor) -> float:
    """The factor that gives them the entropy, which falls with it."""
    low, high = SEARCHED_SCALES
    for _ in range(SEARCH_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle * logits_XK) > ENTROPY else (low, middle)
    return low


def sample(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, count: int) -> torch.Tensor:
    """Prompts, padded on the left, with exactly `count` new tokens each, by Hugging Face `generate`."""
    answers_BT: torch.Tensor = model.generate(
        input_ids=tokens_BT,
        attention_mask=mask_BT,
        do_sample=True,
        top_k=TOP_K,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=PAD,
    )
    assert answers_BT.shape[1] == tokens_BT.shape[1] + count
    return answers_BT


@torch.no_grad()
def top_logits(model: Any, tokens_BT: torch.Tensor, num_last: int) -> torch.Tensor:
    """The largest logits at the last positions of every row, [X, K]."""
    hidden_BTC = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return model.lm_head(hidden_BTC[:, -num_last:].flatten(0, 1)).float().topk(TOP_K).values


def entropy(logits_XK: torch.Tensor) -> float:
    """Of the candidates, nats; the mean over positions."""
    logprobs_XK = logits_XK.log_softmax(-1)
    return float(-(logprobs_XK.exp() * logprobs_XK).sum(-1).mean())


def value_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> ValueModel:
    """The first layers of a model of this shape, with one head."""
    with device:
        backbone = AutoModel.from_config(shape.config(VALUE_LAYERS), dtype=dtype, attn_implementation="sdpa")
    return with_heads(spread(backbone), device, 1)


def with_heads(backbone: Any, device: torch.device, count: int) -> ValueModel:
    """A value model around a backbone, whose values have the standard deviation TILT_SD / BETA over random tokens: two
    objectives of equal weight then tilt by TILT_SD.
    """
    with device:
        model = ValueModel(backbone, count)
        torch.nn.init.normal_(model.heads.weight, std=TILT_SD / BETA / math.sqrt(backbone.config.hidden_size))
    return model.eval().requires_grad_(False)
