"""The policies to train: their names, settings and places in a run. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from mavis_dist.store.files import Store
from mavis_dist.types import UserError

FOLDER, TRAINING = "policies", "train/policies"  # of a run: finished policies, checkpoints of unfinished ones
RL, DPO = "rl", "dpo"
KLS = {RL: 0.2, DPO: 0.3}  # by kind: the default of `kl` (PolicySpec)
PAIR_WEIGHTS = (0.25, 0.5, 0.75)  # of the first objective of a pair, for MORLHF


@dataclass(frozen=True)
class PolicySpec:
    """A policy to be trained."""

    name: str
    kind: str  # RL or DPO
    weights: Mapping[str, float]  # objective -> weight in the reward, which sum to 1; one objective: 1
    # RL: standard deviations of reward that a nat of divergence costs, 1 / beta of `steer.beta`. DPO: its beta.
    kl: float

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.name}"


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """How a policy is trained; the budgets bound each policy."""

    seconds: float = _setting(1500.0, "longest training of one policy")
    tokens: int = _setting(230_000, "most tokens sampled to train one policy by RL")
    rank: int = _setting(16, "rank of the low-rank adapters")
    alpha: int = _setting(32, "scale of the low-rank adapters")
    rl_learning_rate: float = _setting(2e-4, "learning rate of RL")
    dpo_learning_rate: float = _setting(2e-4, "learning rate of DPO")
    prompts_per_step: int = _setting(8, "prompts of a step of RL")
    answers_per_prompt: int = _setting(4, "answers to each of them")
    sampled_per_answer: int = _setting(4, "answers sampled for each of these: the best and the worst are trained on")
    updates: int = _setting(1, "optimiser steps on the answers of a step of RL")
    pairs_per_prompt: int = _setting(2, "pairs of DPO per tree: best and worst answer, second best and worst, ...")
    pairs_per_step: int = _setting(16, "pairs of a step of DPO")
    epochs: int = _setting(1, "passes of DPO over the pairs")
    rows_per_pass: int = _setting(16, "most answers in one forward pass of training")
    save_steps: int = _setting(5, "steps between checkpoints")


def policy(kind: str, weights: Mapping[str, float], kl: float, tag: str = "") -> PolicySpec:
    """The policy for an objective, or for weights of several."""
    shares = {name: round(share, 10) for name, share in weights.items()}
    if len(shares) == 1:
        stem = f"{kind}-{next(iter(shares))}"
    else:
        stem = f"morlhf-{'-'.join(f'{name}{share:g}' for name, share in shares.items())}"
    return PolicySpec(f"{stem}-kl{kl:g}{tag}", kind, shares, kl)


def catalogue(
    objectives: Sequence[str],
    rl_kls: Sequence[float] = (KLS[RL],),
    dpo_kls: Sequence[float] = (KLS[DPO],),
    pair_weights: Sequence[float] = PAIR_WEIGHTS,
    tag: str = "",
) -> list[PolicySpec]:
    """All policies: by RL and by DPO one per objective, and by RL one per weight vector of every pair (MORLHF).

    Args:
        pair_weights: of the first objective of a pair.
        tag: end of all names, for a second round with other settings.
    """
    specs = []
    for name in objectives:
        specs += [policy(RL, {name: 1.0}, kl, tag) for kl in rl_kls]
        specs += [policy(DPO, {name: 1.0}, kl, tag) for kl in dpo_kls]
    for one, other in combinations(objectives, 2):
        for weight in pair_weights:
            specs += [policy(RL, {one: weight, other: 1 - weight}, kl, tag) for kl in rl_kls]
    return specs


def chosen(specs: Sequence[PolicySpec], patterns: Sequence[str] | None) -> list[PolicySpec]:
    """Those whose names fit any pattern such as `rl-*`, None: all; raises UserError for a pattern that fits none."""
    for pattern in patterns or ():
        if not any(fnmatchcase(spec.name, pattern) for spec in specs):
            known = ", ".join(spec.name for spec in specs)
            raise UserError(f"--policies: {pattern!r} fits no policy; there are {known}")
    return [spec for spec in specs if patterns is None or any(fnmatchcase(spec.name, p) for p in patterns)]


def is_stored(store: Store, spec: PolicySpec, settings: Settings) -> bool:
    """Whether a policy is finished.

    Raises:
        UserError: it was trained with other settings.
    """
    metadata = store.metadata(spec.folder)
    if metadata is None:
        return False
    for key, value in asdict(settings).items():
        if metadata["settings"].get(key) != value:
            raise UserError(
                f"policy {spec.name!r} was trained with {key} {metadata['settings'].get(key)}, not {value}: "
                f"use the same settings, or --tag to train it under another name"
            )
    return True


def marker(
    spec: PolicySpec, settings: Settings, base_fingerprint: str, machine: str, usage: Mapping[str, Any]
) -> dict[str, Any]:
    """What the marker of a finished policy holds; `machine`: the one that it was trained on."""
    about = {"kind": spec.kind, "weights": dict(spec.weights), "kl": spec.kl, "base": base_fingerprint}
    return {**about, "machine": machine, "settings": asdict(settings), **usage}
