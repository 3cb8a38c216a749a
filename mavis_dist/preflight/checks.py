"""All checks of a config that need neither a cluster nor a GPU, in one place: `check`.

They load no weights: models are built on torch's device `meta`, where tensors have shapes only. Every problem is a
UserError, one line with the thing, its value and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mavis_dist.config import Config
from mavis_dist.core.packing import pack
from mavis_dist.core.tree import ROOT, Finish, Targets, TreeBuilder
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.load import BaseModel, fetch, load_skeleton
from mavis_dist.models.states import first_layers, state_layer
from mavis_dist.models.value import ValueModel, ValueModelError, from_base
from mavis_dist.preflight import describe
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards.trial import Trial, try_reward
from mavis_dist.sections import OF_BASE
from mavis_dist.train.fit import outputs
from mavis_dist.types import Prompt, UserError, one_line

Tell = Callable[[str, str], None]  # topic, what would be used


@dataclass(frozen=True)
class Findings:
    """What the checks have found."""

    train: list[Prompt]
    evaluation: list[Prompt]
    rewards: Mapping[str, Trial]  # by objective


def check(config: Config, tell: Tell = lambda topic, text: None) -> Findings:
    """Try everything that a run of this config needs, the cheap things first, and tell what would be used.

    Raises:
        UserError: the first problem.
    """
    base = check_base(config)
    for topic, text in describe.base(config, base):
        tell(topic, text)
    train, evaluation = check_prompts(config, base)
    tell("prompts", describe.prompts(config, base, train, evaluation))
    model = check_value(config, base)
    for topic, text in describe.value(config, base, model):
        tell(topic, text)
    rewards = {}
    for name, objective in config.objectives.items():
        rewards[name] = try_reward(name, objective, config.rollout.max_tokens)
        tell(f"reward {name}", describe.reward(objective, rewards[name]))
    return Findings(train, evaluation, rewards)


def check_base(config: Config) -> BaseModel:
    """The base model without weights: its files, architecture, tokenizer, ids that end answers, and context."""
    base = load_skeleton(config.base.model, config.base.dtype)
    base_decoder(base.model, use_hf_forward=True)  # refuses architectures by name
    _check_device(config.base.device)
    return base


def check_prompts(config: Config, base: BaseModel) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for training and for evaluation. The place for what is checked of every single prompt."""
    return load_prompts(config.prompts, config.seed)


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
    """Raises UserError for a name that is no torch device. Whether a machine has it is known there alone."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise UserError(f"config key 'base.device' is {device!r} ({one_line(error)}): use cpu or cuda") from None
