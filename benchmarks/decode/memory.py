"""Memory growth of an engine over thousands of short requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.models.load import BaseModel
from mavis_dist.models.value import ValueModel

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=0,
)
WAVE = 100  # requests submitted at a time; more than the engine has rows


def measure(checkpoints: Sequence[int]) -> dict[str, float]:
    """Resident memory in MB after each of these numbers of requests, in a separate process.

    In a process that had loaded large models, growth could reuse the memory that they had freed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_soak, tuple(checkpoints)).result()


def _soak(checkpoints: Sequence[int]) -> dict[str, float]:
    engine, source = _engine(), random.Random(0)
    memory, num_answered = {}, 0
    for checkpoint in checkpoints:
        while num_answered < checkpoint:
            engine.generate([_request(str(i), source) for i in range(WAVE)])
            num_answered += WAVE
        memory[str(checkpoint)] = psutil.Process().memory_info().rss / 1e6
    return memory


def _engine() -> Engine:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    value = ValueModel(LlamaModel(CONFIG), 1).eval().requires_grad_(False)
    torch.nn.init.normal_(value.heads.weight)
    words = WordLevel({str(i): i for i in range(CONFIG.vocab_size)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    base = BaseModel(model, tokenizer, "tiny", "tiny", "tiny", eos_ids=(0,), max_context=256)
    return Engine(base, LocalGuide({"a": value}), max_rows=32)


def _request(name: str, source: random.Random) -> Request:
    """A short prompt and a short answer; half of the requests are guided."""
    return Request(
        id=name,
        prompt=tuple(source.randrange(1, CONFIG.vocab_size) for _ in range(source.randrange(1, 24))),
        weights={"a": float(source.randrange(2))},
        tilt_cap=2.5,
        params=SamplingParams(max_tokens=source.randrange(1, 9), seed=source.randrange(2**32)),
        scorer=Scorer.LAZY,
    )
