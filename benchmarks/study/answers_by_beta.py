"""Answers to unseen prompts from the base model, and from every value model at every strength. No Ray.

One engine holds all value models. A setting is stored as soon as its last answer is finished, and not measured again.
All settings answer a prompt with the same seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.common import answers
from benchmarks.common.answers import Answers, score
from benchmarks.common.engines import load_engine, template
from benchmarks.common.result_cache import EvaluatedModel, result_path
from mavis_dist.config import Config
from mavis_dist.decode import Choice, Engine, Request
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt


@dataclass(frozen=True)
class Setting:
    """A value model and the strength of its tilt."""

    model: str | None = None  # None: the base model alone
    beta: float = 0.0

    @property
    def name(self) -> str:
        return "base" if self.model is None else f"{self.model}-beta{self.beta:g}"


BASE = Setting()


def measure(
    config: Config, store: Store, models: Sequence[EvaluatedModel], betas: Sequence[float]
) -> dict[Setting, Answers]:
    """Answers of the base model and of every value model at every strength; stored ones are read."""
    _, prompts = load_prompts(config.prompts, config.seed)
    settings = [BASE, *(Setting(model.name, beta) for model in models for beta in betas)]
    paths = _paths(config, prompts, models, settings)
    missing = [setting for setting in settings if not store.exists(paths[setting])]
    if missing:
        used = {setting.model for setting in missing}
        base, engine = load_engine(config, [model for model in models if model.name in used])
        rewards = {name: build(spec) for name, spec in config.objectives.items()}
        tokens = [base.chat(prompt.text, config.base.system) for prompt in prompts]
        for done, (setting, choices) in enumerate(generate(engine, missing, tokens, template(config)), 1):
            store.write_json(paths[setting], asdict(score(choices, [prompt.text for prompt in prompts], rewards)))
            print(f"{'measure':<24} {done}/{len(missing)} settings: {setting.name}", file=sys.stderr, flush=True)
    return {setting: Answers(**store.read_json(path)) for setting, path in paths.items()}


def generate(
    engine: Engine, settings: Sequence[Setting], prompts: Sequence[tuple[int, ...]], common: Request
) -> Iterator[tuple[Setting, list[Choice]]]:
    """One answer per setting and prompt (token ids); yields a setting when its last answer is finished."""
    requests = {}
    for setting in settings:
        weights = {} if setting.model is None else {setting.model: 1.0}
        steered = replace(common, weights=weights, beta=setting.beta)
        requests[setting] = [
            replace(steered, prompt=prompt, params=replace(common.params, seed=p)) for p, prompt in enumerate(prompts)
        ]
    return answers.generate(engine, requests)


def _paths(
    config: Config, prompts: Sequence[Prompt], models: Sequence[EvaluatedModel], settings: Sequence[Setting]
) -> Mapping[Setting, str]:
    fingerprints = {model.name: model.fingerprint for model in models}
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(template(config).params),
        "tilt_cap": config.steer.tilt_cap,
        "rewards": {name: spec.model_dump(mode="json") for name, spec in config.objectives.items()},
    }
    return {
        setting: result_path(
            "answers",
            setting.name,
            {**common, "beta": setting.beta, "value_model": fingerprints[setting.model] if setting.model else None},
        )
        for setting in settings
    }
