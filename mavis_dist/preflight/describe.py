"""What a config would use, in short lines for `python -m jobs.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mavis_dist.config import Config
from mavis_dist.models.chat import place_of_system, takes_system
from mavis_dist.models.end_tokens import describe_disagreement
from mavis_dist.models.load import BaseModel, fetch
from mavis_dist.models.masks import FULL, SIZES, layer_types, text_config
from mavis_dist.models.value import ValueModel
from mavis_dist.prompts import PromptSet
from mavis_dist.rewards.trial import Trial
from mavis_dist.sections import Objective
from mavis_dist.sizing.memory import num_value_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
SHOWN = 160  # characters of a rendered prompt
TRAINING_BYTES = 16  # per trained parameter: weight, gradient and two moments of AdamW in single precision
SYSTEM, QUESTION = "SYSTEM TEXT", "QUESTION"


def base(config: Config, model: BaseModel) -> Iterator[tuple[str, str]]:
    settings: Any = model.model.config.get_text_config()
    size = f"{settings.num_hidden_layers} layers, {model.model.num_parameters() / 1e6:,.0f} million parameters"
    yield "model", f"{model.name}: {settings.model_type}, {size}, {config.base.dtype} on {config.base.device}"
    yield "template", template(model)
    yield "system", system(model)
    ends = ", ".join(f"{id_} {model.tokenizer.convert_ids_to_tokens(id_)!r}" for id_ in model.eos_ids)
    yield "ends answers", ends
    yield "windows", windows(model.model)


def template(model: BaseModel) -> str:
    """Where the chat template comes from, and what it makes of a question."""
    source = "of the tokenizer" if model.tokenizer.chat_template else "none, turns are labelled User: and Assistant:"
    text = rendered(model)
    shown = repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
    return f"{source}: {shown}"


def rendered(model: BaseModel) -> str:
    """A question as the model reads it."""
    return str(model.tokenizer.decode(list(model.chat(QUESTION, SYSTEM))))


def system(model: BaseModel) -> str:
    """What becomes of a system text."""
    place = place_of_system(model.tokenizer)
    return {
        "turn": "a turn of its own",
        "question": "put before the first question, since the template rejects it",
        None: "left out by the template",
    }[place]


def windows(model: Any) -> str:
    """Which layers attend to a window or chunk only."""
    config, kinds = text_config(model), sorted(layer_types(model) - {FULL})
    stated = Counter(getattr(config, "layer_types", None) or dict.fromkeys(kinds, config.num_hidden_layers))
    parts = [
        f"{stated[kind]} layers: {kind.replace('_', ' ')} of {getattr(config, SIZES[kind])} tokens" for kind in kinds
    ]
    num_full = config.num_hidden_layers - sum(stated[kind] for kind in kinds)
    return ", ".join([*parts, *[f"{num_full} layers full"] * (num_full > 0)]) if parts else "none"


def prompts(config: Config, drawn: PromptSet, longest: int, room: int, of: str) -> Iterator[tuple[str, str]]:
    """`room`: the shortest context in tokens, `of` a model by its config key."""
    wanted = config.prompts
    text = (
        f"{len(drawn.train) - wanted.validation} to train, {wanted.validation} to validate, {len(drawn.evaluation)} to "
        f"evaluate from {wanted.source}; the longest has {longest} tokens with its template, answers "
        f"{config.rollout.max_tokens}; the context of {of} has room for {room}"
    )
    yield "prompts", text


def notes(config: Config, model: BaseModel, drawn: PromptSet) -> Iterator[tuple[str, str]]:
    """What the source, the template and the model leave out or disagree about."""
    if drawn.left_out:
        yield "prompts", drawn.left_out
    if lost := lost_system(config, model.tokenizer):
        yield "prompts", lost
    if ends := describe_disagreement(fetch(model.name), model.tokenizer):
        yield "model", ends


def lost_system(config: Config, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One line if the chat template leaves `base.system` out; None if it is given."""
    if not config.base.system or takes_system(tokenizer):
        return None
    return f"base.system is not given to {config.base.model}: its chat template leaves system texts out"


def value(config: Config, model: BaseModel, trained: ValueModel) -> Iterator[tuple[str, str]]:
    settings, count = config.value, sum(parameter.numel() for parameter in trained.parameters())
    layers = trained.backbone.config.num_hidden_layers
    if settings.kind == "states":
        yield "value models", f"heads on the states behind layer {layers} of the base model"
    else:
        whose = "one with a head per objective" if settings.kind == "shared" else "one per objective"
        yield "value models", f"{whose}: {layers} layers of {config.backbone}, {count / 1e6:,.0f} million parameters"
    yield "memory", memory(config, model, 0 if settings.kind == "states" else count)


def memory(config: Config, model: BaseModel, num_value_parameters: int) -> str:
    """An estimate of models and caches; processes and libraries need about 1 GiB more (`jobs.plan` says more)."""
    width = torch.empty((), dtype=getattr(torch, config.base.dtype)).element_size()
    cells = config.rollout.rows * min(model.max_context, 2 * config.rollout.max_tokens)
    base, size = width * model.model.num_parameters() + cells * token_bytes(model, width), config.base.tensor_parallel
    whole = base / size + width * num_value_models(config) * num_value_parameters
    process = "rollout actor" if size == 1 else f"process of a rollout actor of {size}"
    parts = [f"about {whole / GIB:.1f} GiB per {process}"]
    if num_value_parameters:
        training = num_value_parameters * TRAINING_BYTES
        parts.append(f"{training / GIB:.1f} GiB and activations per training worker")
    return ", ".join(parts)


def token_bytes(model: BaseModel, width: int) -> int:
    """Keys and values of one token in all layers, whose heads may differ."""
    return sum(2 * _channels(layer) * width for layer in text_config(model.model).per_layer_config)


def _channels(layer: Any) -> int:
    """Of the keys of one token in one layer, given its config."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(heads * size)


def reward(name: str, objective: Objective, trial: Trial) -> Iterator[tuple[str, str]]:
    settings = ", ".join(f"{key} {text}" for key, text in objective.model_dump().items() if key != "reward")
    scores = f"{min(trial.scores):.3g} to {max(trial.scores):.3g} on {len(trial.scores)} made-up answers"
    yield f"reward {name}", f"{objective.reward}{f' ({settings})' if settings else ''}: {scores}"
