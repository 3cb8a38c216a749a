"""All checks of a config that need neither a cluster nor a GPU, in one place: `check`.

They load no weights of language models, which are built on torch's device `meta`, where tensors have shapes only. The
models of rewards (classifiers and embedders) are loaded whole. Every problem is a UserError, one line with the thing,
its value and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mavis_dist.config import Config
from mavis_dist.core.packing import pack
from mavis_dist.core.tree import ROOT, Finish, Targets, TreeBuilder
from mavis_dist.models.chat import ChatError
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.directory import loading, quiet
from mavis_dist.models.load import BaseModel, context_length, fetch, load_skeleton
from mavis_dist.models.states import first_layers, state_layer
from mavis_dist.models.value import ValueModel, ValueModelError, from_base
from mavis_dist.preflight import describe
from mavis_dist.preflight.machine import check_packages
from mavis_dist.prompts import PromptError, PromptSet, draw_prompts
from mavis_dist.rewards.trial import Trial, try_reward
from mavis_dist.sections import OF_BASE
from mavis_dist.train.fit import outputs
from mavis_dist.types import UserError, one_line

DEVICES = ("cpu", "cuda")  # with a number or without
Tell = Callable[[str, str], None]  # topic, what would be used


@dataclass(frozen=True)
class Findings:
    """What the checks have found."""

    prompts: PromptSet
    rewards: Mapping[str, Trial]  # by objective
    notes: Sequence[tuple[str, str]]  # topic, what a user may not expect; a run says them once


def check(config: Config, tell: Tell = lambda topic, text: None) -> Findings:
    """Try everything that a run of this config needs, the cheap things first, and tell what would be used.

    Raises:
        UserError: the first problem.
    """
    check_packages(config)
    base = check_base(config)
    for topic, text in describe.base(config, base):
        tell(topic, text)
    prompts, longest = check_prompts(config, base)
    tell("prompts", describe.prompts(config, base, prompts, longest))
    notes = list(describe.notes(config, base, prompts))
    for topic, text in notes:
        tell(topic, text)
    model = check_value(config, base)
    for topic, text in describe.value(config, base, model):
        tell(topic, text)
    rewards = {}
    for name, objective in config.objectives.items():
        rewards[name] = try_reward(name, objective, config.rollout.max_tokens, prompts.sample)
        tell(f"reward {name}", describe.reward(objective, rewards[name]))
        if (doubt := rewards[name].doubt) is not None:
            notes.append((f"reward {name}", doubt))
            tell(*notes[-1])
    return Findings(prompts, rewards, notes)


def check_base(config: Config) -> BaseModel:
    """The base model without weights: its files, architecture, tokenizer, ids that end answers, and context."""
    base = load_skeleton(config.base.model, config.base.dtype)
    base_decoder(base.model, use_hf_forward=True)  # refuses architectures by name
    _check_device(config.base.device)
    return base


def check_prompts(config: Config, base: BaseModel) -> tuple[PromptSet, int]:
    """All prompts, after each was put through the chat template, and the tokens of the longest one with its template.

    Raises PromptError with the row of a prompt that the template rejects, or that leaves no room for an answer.
    """
    prompts, longest_answer = draw_prompts(config.prompts, config.seed), config.rollout.max_tokens
    context, of = base.max_context, f"base.model {config.base.model!r}"
    if config.value.kind != "states" and config.value.backbone != OF_BASE:
        context, of = min((context, of), (context_length(config.value.backbone), "value.backbone"))
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


def check_value(config: Config, base: BaseModel) -> ValueModel:
    """The value model without weights, after a forward pass over a tiny packed tree; raises UserError."""
    value = config.value
    if value.kind == "states":
        model = ValueModel(first_layers(base.model, state_layer(base.model.config, value.layers)), 1)
        name = f"base.model {config.base.model!r}"
    else:
        backbone = config.base.model if value.backbone == OF_BASE else value.backbone
        name = f"value.backbone {backbone!r}"
        try:
            model = from_base(fetch(backbone), value.layers, has_weights=False)
        except UserError:
            raise
        except Exception as error:  # transformers raises anything for what an architecture does not support
            raise ValueModelError(
                f"{name} cannot be a value model ({one_line(error)}): choose another value.backbone, or "
                "value.kind=states"
            ) from error
        _check_vocabulary(name, model, base)
        _check_weights(name, fetch(backbone), model)
    _try_packed_tree(name, model)
    return model


def _check_vocabulary(name: str, model: ValueModel, base: BaseModel) -> None:
    """Raises ValueModelError unless the model has an embedding for every token of the base model."""
    have, need = (model_.config.get_text_config().vocab_size for model_ in (model.backbone, base.model))
    if have < min(need, len(base.tokenizer)):
        raise ValueModelError(
            f"{name} knows {have} tokens, but the base model's tokenizer has {len(base.tokenizer)}: choose a backbone "
            "with the same tokenizer"
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
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ValueModelError(
            f"{name} lacks the weights {', '.join(missing[:3])}: choose another value.backbone, or value.kind=states"
        )


def _try_packed_tree(name: str, model: ValueModel) -> None:
    """One pass over a packed tree with a split, as training makes it."""
    try:
        with torch.no_grad():
            outputs(model.to("meta"), tiny_batch())
    except NotImplementedError:
        return  # an operation without a rule for shapes alone: nothing is known
    except Exception as error:
        if "meta tensor" in str(error):  # likewise: it looks at values
            return
        raise ValueModelError(
            f"{name} cannot be trained on packed trees ({one_line(error)}): choose another value.backbone, or "
            "value.kind=states"
        ) from error


def tiny_batch() -> Any:
    """A packed tree: two answers to a prompt of two tokens, and one that branches off within the first."""
    builder = TreeBuilder("tiny", "base", 0, [1, 2])
    first = builder.add(ROOT, 0, [3, 4, 5], [0.0] * 3, Finish.STOP)
    builder.add(ROOT, 0, [6, 7], [0.0] * 2, Finish.STOP)
    builder.add(first, 1, [8], [0.0], Finish.STOP)
    tree = builder.build()
    zeros = np.zeros(tree.num_nodes, dtype=np.int32)
    ends_X = 2 + tree.node_start[1:].astype(np.int64) - 1
    return pack([tree], [Targets(ends_X, zeros.astype(np.float32), zeros, zeros - 1)], np.ones(1))


def _check_device(device: str) -> None:
    """Raises UserError for a device that nothing here runs on. Whether a machine has it is known there alone."""
    try:
        kind, problem = torch.device(device).type, "a model cannot answer there"
    except RuntimeError as error:
        kind, problem = "", one_line(error)
    if kind not in DEVICES:
        raise UserError(f"config key 'base.device' is {device!r} ({problem}): use cpu or cuda")
