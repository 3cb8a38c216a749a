"""What a study ran on: settings of the run and of the measurement, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mavis_dist.config import Config
from mavis_dist.sections import TreeShape

CPU_FACTS = Path("/proc/cpuinfo")


def describe(config: Config, betas: Sequence[float], command: str) -> dict[str, str]:
    """Topic -> one line of text."""
    prompts, rollout, steer = config.prompts, config.rollout, config.steer
    rewards = ", ".join(f"{name} ({spec.reward})" for name, spec in config.objectives.items())
    return {
        "command": f"`{command}`",
        "base model": f"{config.base.model}, {config.base.dtype}",
        "value models": f"{_backbone(config)}, trained for {config.train.epochs} epochs in {config.train.dtype} on "
        f"targets at every {config.train.targets}",
        "objectives": rewards,
        "prompts": f"{prompts.source}: {prompts.train - prompts.validation} to train on, {prompts.validation} held out "
        f"to measure the value models, {prompts.evaluation} unseen",
        "trees": f"{_shape(rollout.first)} of the base model, {_shape(rollout.later)} of each tilted policy "
        f"(children of the prompt / of a node / layers); answers of at most {rollout.max_tokens} tokens",
        "tilt": f"beta {steer.beta:g} in training, {', '.join(f'{beta:g}' for beta in betas)} in the measurement; "
        f"at most {_cap(steer.tilt_cap)} a token; all {rollout.top_k} candidates scored",
        "seeds": f"{config.seed} for trees and training; unseen prompt p is answered with seed p under every setting",
        "machine": machine(),
    }


def machine() -> str:
    """Processor, cores, memory and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed", "ray"))
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _backbone(config: Config) -> str:
    layers = "all layers" if config.value.layers is None else f"the first {config.value.layers} layers"
    return f"{layers} of {'the base model' if config.value.backbone == 'base' else config.value.backbone}"


def _shape(shape: TreeShape) -> str:
    return f"{shape.root}/{shape.children}/{shape.layers}"


def _cap(cap: float | None) -> str:
    return "any number of nats" if cap is None else f"{cap:g} nats"
