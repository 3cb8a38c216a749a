"""Settings of a study: those of the run and those of the measurement."""

from __future__ import annotations

from collections.abc import Sequence

from mavis_dist.config import Config
from mavis_dist.core.limit import largest_divergence
from mavis_dist.sections import TreeShape

TARGETS = {
    "token": "targets at every token",
    "prefix": "targets at every token and the rewards of unfinished answers",
    "node": "targets at the ends of segments",
}


def describe(config: Config, betas: Sequence[float]) -> dict[str, str]:
    """Topic -> one line of text."""
    prompts, rollout, steer, num_answers = config.prompts, config.rollout, config.steer, config.evaluate.limit_answers
    later = f", {_shape(rollout.later)} of each tilted policy" if config.iterations > 1 else ""
    rewards = ", ".join(f"{name} ({spec.reward})" for name, spec in config.objectives.items())
    return {
        "base model": f"{config.base.model}, {config.base.dtype}",
        "value models": f"{_trained(config)} on {TARGETS[config.train.targets]}, weight "
        f"{config.train.sibling_weight:g} of sibling differences",
        "objectives": rewards,
        "prompts": f"{prompts.source}: {prompts.train - prompts.validation} to train on, {prompts.validation} held out "
        f"to measure the value models, {prompts.evaluation} unseen",
        "trees": f"{_shape(rollout.first)} of the base model{later} "
        f"(children of the prompt / of a node / layers); answers of at most {rollout.max_tokens} tokens",
        "tilt": f"beta {steer.beta:g} in training, {', '.join(f'{beta:g}' for beta in betas)} in the measurement; "
        f"{_cap(steer.tilt_cap)}; lazy scoring of {rollout.top_k} candidates",
        "limit": f"from {num_answers} answers of the base model to every unseen prompt; known up to "
        f"{largest_divergence(num_answers):.2f} nats",
        "seeds": f"{config.seed} for trees and training; unseen prompt p is answered with seed p under every setting",
    }


def _trained(config: Config) -> str:
    if config.value.kind == "states":
        layer = "two thirds of its layers" if config.value.layers is None else f"layer {config.value.layers}"
        return f"linear heads on the base model's states behind {layer}, fitted in closed form"
    return f"{_backbone(config)}, trained for {config.train.epochs} epochs in {config.train.dtype}"


def _backbone(config: Config) -> str:
    layers = "all layers" if config.value.layers is None else f"the first {config.value.layers} layers"
    trunk = f"{layers} of {'the base model' if config.value.backbone == 'base' else config.value.backbone}"
    return f"{trunk}, {'shared by all objectives' if config.value.kind == 'shared' else 'once per objective'}"


def _shape(shape: TreeShape) -> str:
    return f"{shape.root}/{shape.children}/{shape.layers}"


def _cap(cap: float | None) -> str:
    return "no cap" if cap is None else f"at most {cap:g} nats per token"
