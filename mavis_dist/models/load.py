"""Loads a base model and its tokenizer by name. No Ray, no config objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from mavis_dist.models.directory import (
    WITHOUT_WEIGHTS,
    ModelError,
    check_seal,
    fingerprint_model,
    fingerprint_tokenizer,
    loading,
    quiet,
    read_model,
    read_tokenizer,
)
from mavis_dist.models.fetch import fetch
from mavis_dist.types import NEUTRAL_SYSTEM, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PLAIN_TEMPLATE",
    "BaseModel",
    "ModelError",
    "chat_ids",
    "fetch",
    "fingerprint_model",
    "fingerprint_tokenizer",
    "load_base",
    "load_skeleton",
    "load_tokenizer",
]

# For tokenizers without a chat template: begin-of-text if there is one, the system text, then labelled turns, separated
# by blank lines.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% endif %}"
    "{{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class BaseModel:
    """The language model that is steered, in eval mode and without gradients."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    eos_ids: tuple[int, ...]  # every id that ends an answer
    max_context: int  # longest sequence, in tokens

    def chat(self, conversation: str | Sequence[Mapping[str, str]], system: str = NEUTRAL_SYSTEM) -> tuple[int, ...]:
        """Token ids of a question, or of a conversation as in `chat_ids`, for `Request.prompt`."""
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        return tuple(chat_ids(self.tokenizer, conversation, system))


def load_base(name: str, dtype: str = "float32", device: str = "cpu") -> BaseModel:
    """Fetch and load a causal language model; `name` as in `fetch`, `dtype` and `device` as torch names them.

    Raises:
        ModelError: naming the model or file and the remedy.
    """
    from transformers import AutoModelForCausalLM  # here: processes that load no model start seconds sooner

    directory = fetch(name)
    fingerprint = fingerprint_model(directory)
    check_seal(directory, fingerprint)
    tokenizer = read_tokenizer(directory)
    model = move(read_model(AutoModelForCausalLM, directory, dtype), device)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint,
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        eos_ids=_eos_ids(model, name),
        max_context=_max_context(model, name),
    )


def load_skeleton(name: str, dtype: str = "float32") -> BaseModel:
    """As `load_base`, but its weights have shapes only (torch's device `meta`): refuses what `load_base` refuses, in
    little time and memory. It has no fingerprint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory = fetch(name)
    tokenizer = read_tokenizer(directory)
    with loading(directory), quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **WITHOUT_WEIGHTS)
        if (directory / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    return BaseModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=name,
        fingerprint="",
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        eos_ids=_eos_ids(model, name),
        max_context=_max_context(model, name),
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights in memory; raises ModelError."""
    return read_tokenizer(fetch(name))


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], system: str) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's answer.

    Messages have `role` and `content`. Without a system message, `system` becomes one, so that a chat template's
    default is never used. If a template rejects system messages, their text is put before the first user message.
    Tokenizers without a chat template use PLAIN_TEMPLATE.

    Raises:
        ModelError: if the template rejects the conversation.
    """
    turns = [dict(message) for message in messages]
    if all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    try:
        return _render(tokenizer, turns)
    except jinja2.TemplateError as error:
        rejection = one_line(error)
    try:
        return _render(tokenizer, _without_system(turns))
    except jinja2.TemplateError:
        raise ModelError(
            f"the model's chat template rejects the messages ({rejection}): change their roles or order"
        ) from None


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    ids = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, return_dict=False)
    return list(ids)


def _without_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    if rest and rest[0]["role"] == "user":
        rest[0] = {"role": "user", "content": "\n\n".join([*system, rest[0]["content"]])}
    return rest


def move(model: Any, device: str) -> PreTrainedModel:
    """The model on a torch device; raises ModelError."""
    try:
        return model.to(torch.device(device))
    # AssertionError: torch was not built for the device.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot hold the model ({one_line(error)}): choose cpu or a device that torch lists"
        ) from error


def _eos_ids(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    config = model.generation_config
    ids = None if config is None else config.eos_token_id
    if ids is None:
        raise ModelError(f"model {name!r} has no eos_token_id: add the key to its generation_config.json")
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _max_context(model: PreTrainedModel, name: str) -> int:
    config: Any = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        raise ModelError(f"model {name!r} has no max_position_embeddings: add the key to its config.json")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond it rotations depend on the longest row of the batch: answers would depend on their neighbours.
        length = min(length, rope.get("original_max_position_embeddings") or length)
    return int(length)
