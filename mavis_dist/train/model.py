"""The value model that a fit starts from, and what is stored of the fitted one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mavis_dist.config import Config
from mavis_dist.models.load import fetch, fingerprint_model, fingerprint_tokenizer
from mavis_dist.models.value import Card, ValueModel, from_base, load_objective, save
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit
from mavis_dist.train.journal import Metrics, json_lines, metrics_of


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
    return from_base(fetch(config.backbone), config.value.layers, len(fit.objectives))


def merge_adapters(model: ValueModel) -> ValueModel:
    """The same function, with adapters merged into the weights."""
    merge = getattr(model.backbone, "merge_and_unload", None)
    if merge is not None:
        model.backbone = merge()
    return model


def make_card(fit: Fit, config: Config, r2: float | None, state_layer: int | None = None) -> Card:
    base = fetch(config.base.model)
    return Card(
        objectives=fit.objectives,
        scales=fit.scales,
        rewards=tuple(config.objectives[name].model_dump(mode="json") for name in fit.objectives),
        iteration=fit.iteration,
        parent=None if fit.parent is None else layout.value_folder(fit.objectives[0], fit.parent),
        base_fingerprint=fingerprint_model(base),
        tokenizer_fingerprint=fingerprint_tokenizer(base),
        max_tokens=config.rollout.max_tokens,
        beta=config.steer.beta if fit.iteration > 0 else 0.0,
        r2=r2,
        state_layer=state_layer,
    )


def store_model(
    fit: Fit,
    store: Store,
    model: ValueModel,
    card: Card,
    metrics: Sequence[Metrics],
    figures: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> None:
    """Write a value model with its card, and all metrics of each of its objectives; the marker holds `about` and the
    objective's figures.

    With several objectives the model has a folder of its own, to which theirs point.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, card, Path(folder))
        shared = {}
        if len(fit.objectives) > 1:
            shared[values.SHARED_KEY] = layout.shared_folder(fit.name, fit.iteration)
            store.upload(Path(folder), shared[values.SHARED_KEY], {})
        for objective in fit.objectives:
            target = layout.value_folder(objective, fit.iteration)
            store.write_bytes(f"{target}/{layout.METRICS_FILE}", json_lines(metrics_of(objective, metrics)).encode())
            metadata = {**about, **shared, **figures[objective]}
            if shared:
                store.finish(target, metadata)
            else:
                store.upload(Path(folder), target, metadata)
