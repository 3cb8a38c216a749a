"""What one training worker does: fit one objective's value model to its trees."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mavis_dist import config as config_module
from mavis_dist.models.load import fetch, fingerprint_model, fingerprint_tokenizer, load_tokenizer
from mavis_dist.models.value import Card, ValueModel, from_base, load, save
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.train.data import TreeSet, load_trees, steps, tree_set
from mavis_dist.types import Policy, RewardScale


@dataclass(frozen=True)
class Fit:
    """One value model to be trained."""

    objective: str
    iteration: int  # of the policy whose trees it learns from
    scale: RewardScale
    validation_ids: frozenset[str]  # prompts whose trees measure and do not train

    @property
    def policy(self) -> Policy:
        return Policy() if self.iteration == 0 else Policy(self.objective, self.iteration)


def zeta(config: config_module.Config, iteration: int) -> float:
    """Price of one nat of divergence in standard deviations of reward: 1 / beta, and nothing before any tilt."""
    return 1.0 / config.steer.beta if iteration > 0 and config.steer.beta > 0 else 0.0


def data_of(fit: Fit, config: config_module.Config, store: Store) -> tuple[TreeSet, TreeSet]:
    """Training and validation trees of a fit."""
    shape = config.rollout.first if fit.iteration == 0 else config.rollout.later
    pairs = load_trees(store, fit.policy, fit.objective)
    parts = []
    for validation in (False, True):
        chosen = [pair for pair in pairs if (pair[0].prompt_id in fit.validation_ids) == validation]
        every_token, balance = config.train.targets == "token", config.train.depth_balance
        parts.append(
            tree_set(chosen, fit.scale, zeta(config, fit.iteration), shape.layers, every_token, balance)
            if chosen
            else TreeSet([], [], torch.ones(shape.layers + 1).numpy())
        )
    return parts[0], parts[1]


def start_model(fit: Fit, config: config_module.Config, store: Store) -> ValueModel:
    """The value model of the iteration before, or the truncated base model with heads that say 0."""
    if fit.iteration > 0:
        model, _ = load(values.fetch(store, fit.objective, fit.iteration - 1))
        return model.requires_grad_(True)
    backbone = config.base.model if config.value.backbone == "base" else config.value.backbone
    return from_base(fetch(backbone), config.value.layers)


def trainable_model(fit: Fit, config: config_module.Config, store: Store) -> ValueModel:
    """The model that training starts from. Token embeddings stay as they are: they are half of a small model's
    parameters, and few of them occur in the trees. With `value.lora_rank`, low-rank adapters on every linear layer are
    trained in place of the backbone (arXiv 2508.13415, appendix).
    """
    model = start_model(fit, config, store)
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


def merge_adapters(model: ValueModel) -> ValueModel:
    """The same function without adapters."""
    merge = getattr(model.backbone, "merge_and_unload", None)
    if merge is not None:
        model.backbone = merge()
    return model


def squared_error(model: Any, tree_set_: TreeSet, indices: list[int], device: str) -> torch.Tensor:
    """Sum over the targets of some trees of weight * (V - target)^2; a scalar."""
    batch = tree_set_.batch(indices)
    values_BSM = model(
        input_ids=batch.tokens_BS.to(device),
        position_ids=batch.positions_BS.to(device),
        attention_mask=batch.mask_B1SS.to(device),
        use_cache=False,
    )
    said_BX = values_BSM[..., 0].gather(1, batch.index_BX.to(device))
    error_BX = said_BX - batch.value_BX.to(device)
    return (batch.weight_BX.to(device) * error_BX**2).sum()


@torch.no_grad()
def explained_variance(model: Any, validation: TreeSet, device: str) -> float | None:
    """1 - weighted squared error / weighted variance of the targets; None without validation trees."""
    if len(validation) == 0:
        return None
    error = sum(float(squared_error(model, validation, [i], device)) for i in range(len(validation)))
    batch = validation.batch(list(range(len(validation))))
    weight, value = batch.weight_BX.double(), batch.value_BX.double()
    mean = (weight * value).sum() / weight.sum()
    return 1.0 - error / max(float((weight * (value - mean) ** 2).sum()), 1e-12)


def train(fit: Fit, config: config_module.Config, store: Store, rank: int, world_size: int, progress: Any) -> None:
    """Fit, keep the epoch that explains the validation trees best, and store it (rank 0).

    `progress(done, total, text)` is called after every step. The loss of a step is the mean over all targets of its
    trees, however they are spread over the workers.
    """
    from mavis_dist.train.engine import make_engine, trained_state

    torch.manual_seed(config.seed)
    device = config.base.device
    training, validation = data_of(fit, config, store)
    model = trainable_model(fit, config, store).to(device)
    per_step, per_worker = config.train.trees_per_step, config.train.trees_per_step // world_size
    num_steps = config.train.epochs * math.ceil(len(training) / per_step)
    engine = make_engine(model, config.train.model_dump(), num_steps, per_worker)

    metrics: list[dict[str, Any]] = []
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    done = 0
    for epoch in range(config.train.epochs):
        engine.train()
        for indices in steps(len(training), per_step, epoch, config.seed):
            mine = indices[rank::world_size]
            # Workers average their gradients, hence the factor; a worker without a tree adds a zero of the right shape.
            share = world_size / training.total_weight(indices)
            loss = squared_error(engine, training, mine or indices[:1], device) * (share if mine else 0.0)
            engine.backward(loss)
            engine.step()
            done += 1
            metrics.append({"step": done, "epoch": epoch, "loss": loss.item()})
            progress(done, num_steps, f"loss {loss.item():.3f}")
        engine.eval()
        explained = explained_variance(engine, validation, device)
        metrics.append({"step": done, "epoch": epoch, "explained_variance": explained})
        score = epoch if explained is None else explained
        if best is None or score > best[0]:
            best = (score, trained_state(engine))
    assert best is not None
    if rank == 0:
        # A fresh copy: ZeRO 3 has cut the parameters of the one that was trained into pieces.
        model = trainable_model(fit, config, store)
        unknown = model.load_state_dict(best[1], strict=False).unexpected_keys
        assert not unknown, unknown
        card = make_card(fit, config, None if len(validation) == 0 else best[0])
        _store(merge_adapters(model), card, metrics, fit, store)


def make_card(fit: Fit, config: config_module.Config, explained: float | None) -> Card:
    return Card(
        objectives=(fit.objective,),
        scales=(fit.scale,),
        rewards=(config.objectives[fit.objective].model_dump(mode="json"),),
        iteration=fit.iteration,
        parent=values.folder(fit.objective, fit.iteration - 1) if fit.iteration > 0 else None,
        base_fingerprint=fingerprint_model(fetch(config.base.model)),
        tokenizer_fingerprint=fingerprint_tokenizer(load_tokenizer(config.base.model)),
        max_tokens=config.rollout.max_tokens,
        beta=config.steer.beta if fit.iteration > 0 else 0.0,
        explained_variance=explained,
    )


def _store(model: ValueModel, card: Card, metrics: list[dict[str, Any]], fit: Fit, store: Store) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    store.write_bytes(f"train/{fit.objective}/i{fit.iteration}/metrics.jsonl", lines.encode())
    with tempfile.TemporaryDirectory() as folder:
        save(model, card, Path(folder))
        facts = {"explained_variance": card.explained_variance, "steps": metrics[-1]["step"]}
        store.upload(Path(folder), values.folder(fit.objective, fit.iteration), facts)
