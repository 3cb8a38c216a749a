"""All checks of a config that need neither a cluster nor a GPU, in one place: `check`.

They load no weights of language models, which are built on torch's device `meta`, where tensors have shapes only. The
models of rewards (classifiers and embedders) are loaded whole. Every problem is a UserError, one line with the thing,
its value and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

from mavis_dist.config import Config
from mavis_dist.models.chat import ChatError
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.directory import ModelError, loading, missing_weights, quiet
from mavis_dist.models.load import BaseModel, context_length, fetch, load_skeleton, load_tokenizer
from mavis_dist.models.lockstep import check_shards
from mavis_dist.models.masks import text_config
from mavis_dist.models.states import first_layers, state_layer
from mavis_dist.models.trial import SHORTAGES, try_first_layers
from mavis_dist.models.value import ValueModel, ValueModelError, from_base
from mavis_dist.preflight import describe
from mavis_dist.preflight.machine import check_packages
from mavis_dist.prompts import PromptError, PromptSet, draw_prompts
from mavis_dist.rewards.trial import Trial, try_reward
from mavis_dist.sections import OF_BASE
from mavis_dist.types import UserError, one_line

DEVICES = ("cpu", "cuda")  # with a number or without
Tell = Callable[[str, str], None]  # topic, what would be used


@dataclass(frozen=True)
class Findings:
    """What the checks have found."""

    prompts: PromptSet
    rewards: Mapping[str, Trial]  # by objective
    notes: Sequence[tuple[str, str]]  # topic, what a user may not expect; a run says them once


def check(config: Config, tell: Tell | None = None) -> Findings:
    """Try everything that a run of this config needs, and tell what would be used.

    Raises:
        UserError: the first problem.
    """

    def say(lines: Iterable[tuple[str, str]]) -> None:
        """The lines are made here: a run, which tells nothing, does without them."""
        if tell is not None:
            for topic, text in lines:
                tell(topic, text)

    check_packages(config)
    base = check_base(config)
    say(describe.base(config, base))
    model = check_value(config, base)
    say(describe.value(config, base, model))
    prompts, longest = check_prompts(config, base)
    say(describe.prompts(config, prompts, longest, *shortest_context(config, base)))
    notes = list(describe.notes(config, base, prompts))
    say(notes)
    rewards = {}
    for name, objective in config.objectives.items():
        rewards[name] = try_reward(name, objective, config.rollout.max_tokens, prompts.sample)
        say(describe.reward(name, objective, rewards[name]))
        if (doubt := rewards[name].doubt) is not None:
            notes.append((f"reward {name}", doubt))
            say(notes[-1:])
    return Findings(prompts, rewards, notes)


def check_base(config: Config) -> BaseModel:
    """The base model without weights: its files, architecture, tokenizer, ids that end answers, and context."""
    base = load_skeleton(config.base.model, config.base.dtype)
    base_decoder(base.model, use_hf_forward=True)  # refuses architectures by name
    check_shards(base.model, config.base.model, config.base.tensor_parallel)
    _check_device(config.base.device)
    return base


def check_prompts(config: Config, base: BaseModel) -> tuple[PromptSet, int]:
    """All prompts, after each was put through the chat template, and the tokens of the longest one with its template.

    Raises PromptError with the row of a prompt that the template rejects, or that leaves no room for an answer.
    """
    prompts, longest_answer = draw_prompts(config.prompts, config.seed), config.rollout.max_tokens
    context, of = shortest_context(config, base)
    longest = 0
    for prompt in [*prompts.train, *prompts.evaluation]:
        try:
            length = len(base.chat(prompt.messages, config.base.system))
        except ChatError as error:
            raise PromptError(f"{prompts.where(prompt)} cannot be asked: {error}") from None
        if length + longest_answer > context:
            raise PromptError(
                f"{prompts.where(prompt)} has {length} tokens, and with rollout.max_tokens={longest_answer} more than "
                f"the context of {of} ({context}): shorten or remove the row, or lower rollout.max_tokens"
            )
        longest = max(longest, length)
    return prompts, longest


def shortest_context(config: Config, base: BaseModel) -> tuple[int, str]:
    """Tokens of prompt and answer that all models have room for, and the config key of the one that has the least."""
    contexts = [(base.max_context, f"base.model {config.base.model!r}")]
    if config.value.kind != "states" and config.value.backbone != OF_BASE:
        contexts.append((context_length(config.value.backbone), f"value.backbone {config.value.backbone!r}"))
    return min(contexts, key=itemgetter(0))


def check_value(config: Config, base: BaseModel) -> ValueModel:
    """The value model without weights; raises UserError."""
    value = config.value
    if value.kind == "states":
        view = first_layers(base.model, state_layer(base.model.config, value.layers))
        try:
            try_first_layers(base.model.base_model.config)
        except ModelError as error:
            raise ValueModelError(
                f"the first layers of base.model {config.base.model!r} do not work on their own "
                f"({one_line(error.__cause__ or error)}): choose another base model, or value.kind=model"
            ) from error
        return ValueModel(view, 1)
    is_other = value.backbone != OF_BASE
    name = f"{'value.backbone' if is_other else 'base.model'} {config.backbone!r}"
    folder = fetch(config.backbone)
    try:
        model = from_base(folder, value.layers, has_weights=False)
    except ModelError as error:
        raise ValueModelError(f"{name}: {error}") from error
    except (UserError, *SHORTAGES):
        raise
    except Exception as error:  # transformers raises anything for what an architecture does not support
        raise ValueModelError(
            f"{name} cannot be a value model ({one_line(error)}): choose another value.backbone, or value.kind=states"
        ) from error
    if is_other:
        _check_vocabulary(name, folder, model, base)
        _check_weights(name, folder, model)
    return model


def _check_vocabulary(name: str, folder: Path, model: ValueModel, base: BaseModel) -> None:
    """Raises ValueModelError unless the model has an embedding for every token of the base model, and its tokenizer,
    if there is one, means the same tokens by them.
    """
    have, need = (text_config(model_).vocab_size for model_ in (model.backbone, base.model))
    remedy = "choose a backbone with the same tokenizer"
    if have < min(need, len(base.tokenizer)):
        raise ValueModelError(
            f"{name} knows {have} tokens, but the base model's tokenizer has {len(base.tokenizer)}: {remedy}"
        )
    if not any(folder.glob("tokenizer*")):
        return
    ids = load_tokenizer(str(folder)).get_vocab()
    for token, id_ in sorted(base.tokenizer.get_vocab().items(), key=itemgetter(1)):
        if ids.get(token, id_) != id_:
            raise ValueModelError(
                f"{name} has token {token!r} at id {ids[token]}, and the base model's tokenizer at {id_}: {remedy}"
            )


def _check_weights(name: str, folder: Path, model: ValueModel) -> None:
    """Raises ValueModelError unless the files have every weight of the model."""
    from transformers import AutoModel

    with loading(folder), quiet():
        _, info = AutoModel.from_pretrained(
            folder,
            config=deepcopy(model.backbone.config),
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if missing := missing_weights(info, optional=("pooler.",)):
        raise ValueModelError(
            f"{name} lacks the weights {', '.join(missing[:3])}: choose another value.backbone, or value.kind=states"
        )


def _check_device(device: str) -> None:
    """Raises UserError for a device that nothing here runs on. Whether a machine has it is known there alone."""
    try:
        kind, problem = torch.device(device).type, "a model cannot answer there"
    except RuntimeError as error:
        kind, problem = "", one_line(error)
    if kind not in DEVICES:
        raise UserError(f"config key 'base.device' is {device!r} ({problem}): use cpu or cuda")
