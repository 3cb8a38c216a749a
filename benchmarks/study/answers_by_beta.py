"""Answers to unseen prompts from the base model, and from weighted value models at every strength. No Ray.

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
from mavis_dist.decode import Choice, Engine, Request, Scorer
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt


@dataclass(frozen=True)
class Setting:
    """Value models with their weights, and the strength of the tilt."""

    weights: tuple[tuple[str, float], ...] = ()  # by name of the value model; empty: the base model alone
    beta: float = 0.0

    @property
    def name(self) -> str:
        """In file names."""
        weighted = [name if weight == 1 else f"{weight:.3g}-{name}" for name, weight in self.weights]
        return f"{'-'.join(weighted)}-beta{self.beta:g}" if weighted else "base"


BASE = Setting()


def measure(
    config: Config, store: Store, models: Sequence[EvaluatedModel], settings: Sequence[Setting]
) -> dict[Setting, Answers]:
    """Answers under every setting of these value models; stored ones are read."""
    _, prompts = load_prompts(config.prompts, config.seed)
    paths = _paths(config, prompts, models, settings)
    missing = [setting for setting in settings if not store.exists(paths[setting])]
    if missing:
        used = {name for setting in missing for name, _ in setting.weights}
        base, engine = load_engine(config, [model for model in models if model.name in used])
        rewards = {name: build(spec) for name, spec in config.objectives.items()}
        tokens = [base.chat(prompt.messages, config.base.system) for prompt in prompts]
        for done, (setting, choices) in enumerate(generate(engine, missing, tokens, _template(config)), 1):
            store.write_json(paths[setting], asdict(score(choices, [prompt.text for prompt in prompts], rewards)))
            print(f"{'measure':<24} {done}/{len(missing)} settings: {setting.name}", file=sys.stderr, flush=True)
    return {setting: Answers(**store.read_json(path)) for setting, path in paths.items()}


def generate(
    engine: Engine, settings: Sequence[Setting], prompts: Sequence[tuple[int, ...]], common: Request
) -> Iterator[tuple[Setting, list[Choice]]]:
    """One answer per setting and prompt (token ids); yields a setting when its last answer is finished."""
    requests = {}
    for setting in settings:
        steered = replace(common, weights=dict(setting.weights), beta=setting.beta)
        requests[setting] = [
            replace(steered, prompt=prompt, params=replace(common.params, seed=p)) for p, prompt in enumerate(prompts)
        ]
    return answers.generate(engine, requests)


def _template(config: Config) -> Request:
    """With lazy scoring, whose divergences are estimates: right within 3 % as means over the prompts."""
    return replace(template(config), scorer=Scorer.LAZY)


def _paths(
    config: Config, prompts: Sequence[Prompt], models: Sequence[EvaluatedModel], settings: Sequence[Setting]
) -> Mapping[Setting, str]:
    fingerprints = {model.name: model.fingerprint for model in models}
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(_template(config).params),
        "scorer": _template(config).scorer.name,
        "tilt_cap": config.steer.tilt_cap,
        "rewards": {name: spec.model_dump(mode="json") for name, spec in config.objectives.items()},
    }

    def inputs(setting: Setting) -> dict[str, Any]:
        weights = [(name, fingerprints[name], weight) for name, weight in setting.weights]
        return {**common, "beta": setting.beta, "value_models": weights}

    return {setting: result_path("answers", setting.name, inputs(setting)) for setting in settings}
