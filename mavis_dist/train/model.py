"""The value model that a fit starts from, and the card stored with it."""

from __future__ import annotations

from mavis_dist.config import Config
from mavis_dist.models.load import fetch, fingerprint_model, fingerprint_tokenizer, load_tokenizer
from mavis_dist.models.value import Card, ValueModel, from_base, load_objective
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit


def trainable_model(fit: Fit, config: Config, store: Store) -> ValueModel:
    """The model that training starts from. Token embeddings are frozen: they are half of a small model's parameters,
    and few of them occur in the trees. With `value.lora_rank`, low-rank adapters on every linear layer are trained
    instead of the backbone (arXiv 2508.13415, appendix).
    """
    model = _start(fit, config, store)
    if config.value.lora_rank == 0:
        model.backbone.get_input_embeddings().requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.value.lora_rank,
        lora_alpha=config.value.lora_alpha,
        lora_dropout=config.value.lora_dropout,
        target_modules="all-linear",
    )
    model.backbone = get_peft_model(model.backbone, lora)  # type: ignore[assignment]
    return model


def _start(fit: Fit, config: Config, store: Store) -> ValueModel:
    """The value model behind the policy, or the truncated base model with a head of zeros."""
    if fit.parent is not None:
        [objective] = fit.objectives
        model, _ = load_objective(values.fetch(store, objective, fit.parent), objective)
        return model.requires_grad_(True)
    backbone = config.base.model if config.value.backbone == "base" else config.value.backbone
    return from_base(fetch(backbone), config.value.layers, len(fit.objectives))


def merge_adapters(model: ValueModel) -> ValueModel:
    """The same function, with adapters merged into the weights."""
    merge = getattr(model.backbone, "merge_and_unload", None)
    if merge is not None:
        model.backbone = merge()
    return model


def make_card(fit: Fit, config: Config, r2: float | None) -> Card:
    return Card(
        objectives=fit.objectives,
        scales=fit.scales,
        rewards=tuple(config.objectives[name].model_dump(mode="json") for name in fit.objectives),
        iteration=fit.iteration,
        parent=None if fit.parent is None else layout.value_folder(fit.objectives[0], fit.parent),
        base_fingerprint=fingerprint_model(fetch(config.base.model)),
        tokenizer_fingerprint=fingerprint_tokenizer(load_tokenizer(config.base.model)),
        max_tokens=config.rollout.max_tokens,
        beta=config.steer.beta if fit.iteration > 0 else 0.0,
        r2=r2,
    )
