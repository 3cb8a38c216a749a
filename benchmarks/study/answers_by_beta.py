"""Answers to unseen prompts from the base model, and from every value model at every strength. No Ray.

One engine holds all value models. A setting is kept as soon as its last answer is written, and is skipped from then on.
Every setting answers a prompt from the same seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.common import answers
from benchmarks.common.answers import Answers, scored
from benchmarks.common.engines import load_engine, template
from benchmarks.common.result_cache import Subject, cell_path
from mavis_dist.config import Config
from mavis_dist.decode import Choice, Engine, Request
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt


@dataclass(frozen=True)
class Setting:
    """Who tilts the answers, and how strongly."""

    subject: str | None = None  # a value model; none: the base model alone
    beta: float = 0.0

    @property
    def name(self) -> str:
        return "base" if self.subject is None else f"{self.subject}-beta{self.beta:g}"


BASE = Setting()


def measure(
    config: Config, store: Store, subjects: Sequence[Subject], betas: Sequence[float]
) -> dict[Setting, Answers]:
    """Answers of the base model and of every value model at every strength, those already in the store from there."""
    _, prompts = load_prompts(config.prompts, config.seed)
    settings = [BASE, *(Setting(subject.name, beta) for subject in subjects for beta in betas)]
    paths = _paths(config, prompts, subjects, settings)
    missing = [setting for setting in settings if not store.exists(paths[setting])]
    if missing:
        asked = {setting.subject for setting in missing}
        base, engine = load_engine(config, [subject for subject in subjects if subject.name in asked])
        rewards = {name: build(spec) for name, spec in config.objectives.items()}
        tokens = [base.chat(prompt.text, config.base.system) for prompt in prompts]
        for done, (setting, choices) in enumerate(answer(engine, missing, tokens, template(config)), 1):
            store.write_json(paths[setting], asdict(scored(choices, [prompt.text for prompt in prompts], rewards)))
            print(f"{'measure':<24} {done}/{len(missing)} settings: {setting.name}", file=sys.stderr, flush=True)
    return {setting: Answers(**store.read_json(path)) for setting, path in paths.items()}


def answer(
    engine: Engine, settings: Sequence[Setting], prompts: Sequence[tuple[int, ...]], common: Request
) -> Iterator[tuple[Setting, list[Choice]]]:
    """One answer per setting and prompt (token ids); a setting comes out when its last answer is written."""
    asked = {}
    for setting in settings:
        weights = {} if setting.subject is None else {setting.subject: 1.0}
        steered = replace(common, weights=weights, beta=setting.beta)
        asked[setting] = [
            replace(steered, prompt=prompt, params=replace(common.params, seed=p)) for p, prompt in enumerate(prompts)
        ]
    return answers.answer(engine, asked)


def _paths(
    config: Config, prompts: Sequence[Prompt], subjects: Sequence[Subject], settings: Sequence[Setting]
) -> Mapping[Setting, str]:
    fingerprints = {subject.name: subject.fingerprint for subject in subjects}
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(template(config).params),
        "tilt_cap": config.steer.tilt_cap,
        "rewards": {name: spec.model_dump(mode="json") for name, spec in config.objectives.items()},
    }
    return {
        setting: cell_path(
            "answers",
            setting.name,
            {**common, "beta": setting.beta, "value_model": fingerprints[setting.subject] if setting.subject else None},
        )
        for setting in settings
    }
