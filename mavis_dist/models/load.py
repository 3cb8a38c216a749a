"""Loads a base model and its tokenizer by name. No Ray, no config objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mavis_dist.models.chat import PLAIN_TEMPLATE, chat_ids
from mavis_dist.models.directory import (
    WITHOUT_WEIGHTS,
    ModelError,
    check_seal,
    fingerprint_model,
    fingerprint_tokenizer,
    loading,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
)
from mavis_dist.models.end_tokens import end_ids, mark_as_special
from mavis_dist.models.fetch import fetch
from mavis_dist.types import NEUTRAL_SYSTEM, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mavis_dist.models.rows import Rows

__all__ = [
    "PLAIN_TEMPLATE",
    "BaseModel",
    "ModelError",
    "chat_ids",
    "context_length",
    "fetch",
    "fingerprint_model",
    "fingerprint_tokenizer",
    "fingerprints",
    "load_base",
    "load_skeleton",
    "load_tokenizer",
]


@dataclass(frozen=True)
class BaseModel:
    """The language model that is steered, in eval mode and without gradients; with `rows` it has shapes only."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    eos_ids: tuple[int, ...]  # every id that ends an answer
    max_context: int  # longest sequence, in tokens
    rows: Callable[[], Rows] | None = None  # where another engine computes it; None: this process does

    def chat(self, conversation: str | Sequence[Mapping[str, str]], system: str = NEUTRAL_SYSTEM) -> tuple[int, ...]:
        """Token ids of a question, or of a conversation as in `chat_ids`, for `Request.prompt`."""
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        return tuple(chat_ids(self.tokenizer, conversation, system))


def load_base(name: str, dtype: str = "float32", device: str = "cpu", num_shards: int = 1) -> BaseModel:
    """Fetch and load a causal language model; `name` as in `fetch`, `dtype` and `device` as torch names them.

    Of several shards, one for each process of torch's process group, only this process's is loaded; `lockstep` decodes
    with them.

    Raises:
        ModelError: naming the model or file and the remedy.
    """
    from transformers import AutoModelForCausalLM  # here: processes that load no model start seconds sooner

    directory = fetch(name)
    fingerprint = fingerprint_model(directory)
    check_seal(directory, fingerprint)
    tokenizer = _tokenizer(directory)
    model = read_model(AutoModelForCausalLM, directory, dtype, num_shards=num_shards)
    if num_shards == 1:  # shards are where the process group computes
        model = move(model, device)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint,
        tokenizer_fingerprint=fingerprint_tokenizer(directory),
        eos_ids=end_ids(directory, tokenizer, model.config.get_text_config().vocab_size),
        max_context=_max_context(model.config, name),
    )


@cache
def fingerprints(name: str) -> tuple[str, str]:
    """Of a model and its tokenizer, as this process has found them at first: large files take minutes to read."""
    directory = fetch(name)
    return fingerprint_model(directory), fingerprint_tokenizer(directory)


def load_skeleton(name: str, dtype: str = "float32") -> BaseModel:
    """As `load_base`, but its weights have shapes only (torch's device `meta`): refuses what `load_base` refuses, in
    little time and memory. It has no fingerprint.
    """
    from transformers import AutoModelForCausalLM

    directory = fetch(name)
    tokenizer = _tokenizer(directory)
    config = read_config(directory)
    with loading(directory), quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **WITHOUT_WEIGHTS)
    return BaseModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=name,
        fingerprint="",
        tokenizer_fingerprint=fingerprint_tokenizer(directory),
        eos_ids=end_ids(directory, tokenizer, config.get_text_config().vocab_size),
        max_context=_max_context(config, name),
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights in memory; raises ModelError."""
    return _tokenizer(fetch(name))


def context_length(name: str) -> int:
    """Longest sequence of a model in tokens, prompt and answer, from its config alone; raises ModelError."""
    return _max_context(read_config(fetch(name)), name)


def move(model: Any, device: str) -> PreTrainedModel:
    """The model on a torch device; raises ModelError."""
    try:
        return model.to(torch.device(device))
    # AssertionError: torch was not built for the device.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot hold the model ({one_line(error)}): choose cpu or a device that torch lists"
        ) from error


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(directory)
    mark_as_special(directory, tokenizer)
    return tokenizer


def _max_context(config: Any, name: str) -> int:
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not length or length < 0:  # -1: any length, as XLNet has it
        raise ModelError(f"model {name!r} has no max_position_embeddings: add the key to its config.json")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond it rotations depend on the longest row of the batch: answers would depend on their neighbours.
        length = min(length, rope.get("original_max_position_embeddings") or length)
    return int(length)
