"""Answers to unseen prompts, steered by preferences, value models or prompts, over weights of objective pairs. No Ray.

Lists are P long: one entry per prompt and sample.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

from benchmarks.common.answers import Answers, generate, score
from benchmarks.common.engines import load_engine, template
from benchmarks.common.result_cache import EvaluatedModel, result_path
from benchmarks.steerability.first_person import first_person
from mavis_dist.compare.preferences import PREFERENCES
from mavis_dist.config import Config
from mavis_dist.decode import PRESETS, PreferenceParams, Request, chat_prompts
from mavis_dist.models.load import BaseModel
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, RewardScale, UserError

# An objective without a trained value model: preferences need none.
PERSONAL, PERSONAL_PREFERENCE = "personal", "Write about yourself, in the first person."
MATO = "MATO"
PARAMS: Mapping[str, PreferenceParams] = {
    MATO: PRESETS["mato"],
    "without weight optimisation": replace(PRESETS["mato"], adapt=False),
    "without online optimisation": replace(PRESETS["mato"], c=1.0),
    "without both": PRESETS["anchor"],
    "Linear Alignment": PRESETS["linear_alignment"],
}
TRAINED, PROMPTED, PLAIN = "trained value models", "one prompt with both sentences", "base model"


@dataclass(frozen=True)
class Setting:
    """A method with weights; equal settings generate the same answers."""

    method: str  # a key of PARAMS, or TRAINED, PROMPTED, PLAIN
    weights: tuple[tuple[str, float], ...] = ()  # of the objectives, those above 0

    @property
    def name(self) -> str:
        return " ".join([self.method, *(f"{weight:g} {objective}" for objective, weight in self.weights)])


def setting(method: str, pair: tuple[str, str], weight: float) -> Setting:
    """The setting of a method for a pair of objectives, the first of which has this weight."""
    if method == PLAIN:
        return Setting(PLAIN)
    if method == PROMPTED:
        return Setting(PROMPTED, tuple((name, 1.0) for name in pair))
    shares = ((pair[0], weight), (pair[1], round(1 - weight, 10)))
    weights = tuple((name, share) for name, share in shares if share > 0)
    if len(weights) == 1 and method in PARAMS:  # a single preference always has the whole weight
        method = next(w for w, params in PARAMS.items() if params.strength == PARAMS[method].strength)
    return Setting(method, weights)


@dataclass(frozen=True)
class Measured:
    """All answers, with the settings needed to summarise them."""

    config: Config
    scales: dict[str, RewardScale]  # of the run's objectives; that of PERSONAL is from these answers of the base model
    weights: tuple[float, ...]
    num_prompts: int
    samples: Mapping[str, int]  # answers per prompt, by method (default: one)
    answers: dict[Setting, Answers]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.scales, 2))

    def has(self, method: str, pair: tuple[str, str]) -> bool:
        """False for value models and pairs with PERSONAL."""
        return setting(method, pair, self.weights[0]) in self.answers


def measure(
    config: Config, store: Store, weights: Sequence[float], num_prompts: int, samples: Mapping[str, int]
) -> Measured:
    """Answers for every pair, method and weight; stored ones are read. `samples` as in Measured.

    Raises:
        UserError: fewer than two objectives have a preference, or one of them has no published value model.
    """
    texts = {name: PREFERENCES[spec.reward] for name, spec in config.objectives.items() if spec.reward in PREFERENCES}
    if len(texts) < 2:
        raise UserError(
            f"run {config.run!r} has fewer than two objectives with one of the rewards {', '.join(PREFERENCES)}: "
            "use jobs/configs/study.yaml"
        )
    published = values.published(store)
    if missing := sorted(texts.keys() - published.keys()):
        raise UserError(f"run {config.run!r} has no published value model of {', '.join(missing)}: finish it first")
    models = [EvaluatedModel(n, n, n, published[n], values.fetch(store, n, published[n])) for n in texts]
    texts[PERSONAL] = PERSONAL_PREFERENCE
    prompts = load_prompts(config.prompts, config.seed)[1][:num_prompts]
    settings = _settings(list(combinations(texts, 2)), weights)
    paths = _paths(config, prompts, samples, texts, models, settings)
    todo = [s for s in settings if not store.exists(paths[s])]
    questions = {s: [p.text for p in prompts for _ in range(samples.get(s.method, 1))] for s in settings}
    if todo:
        base, engine = load_engine(config, models)
        rewards = {model.objective: build(config.objectives[model.objective]) for model in models}
        requests = {s: _requests(s, config, base, questions[s], texts) for s in todo}
        for done, (s, choices) in enumerate(generate(engine, requests), 1):
            store.write_json(paths[s], asdict(score(choices, questions[s], rewards)))
            print(f"{'measure':<24} {done}/{len(todo)} settings: {s.name}", file=sys.stderr, flush=True)
    answers = {s: Answers(**store.read_json(path)) for s, path in paths.items()}
    for s, found in answers.items():
        found.reward[PERSONAL] = first_person(questions[s], found.text)
    plain = answers[Setting(PLAIN)].reward[PERSONAL]
    scales = {model.objective: model.scale for model in models}
    scales[PERSONAL] = RewardScale(fmean(plain), pstdev(plain) or 1.0)
    return Measured(config, scales, tuple(weights), len(prompts), samples, answers)


def _settings(pairs: Sequence[tuple[str, str]], weights: Sequence[float]) -> list[Setting]:
    methods = (PLAIN, PROMPTED, TRAINED, *PARAMS)
    used = [(method, pair) for pair in pairs for method in methods if method != TRAINED or PERSONAL not in pair]
    return list(dict.fromkeys(setting(method, pair, weight) for method, pair in used for weight in weights))


def _requests(
    s: Setting, config: Config, base: BaseModel, questions: Sequence[str], texts: Mapping[str, str]
) -> list[Request]:
    """One request per question; its seed is the same under all settings. `texts`: preference of each objective."""
    common, system = replace(template(config), beta=config.steer.beta), config.base.system
    if s.method == TRAINED:
        common = replace(common, weights=dict(s.weights))
    if s.method in PARAMS:
        common = replace(common, preference_params=PARAMS[s.method])
    if s.method == PROMPTED:
        system = "\n".join([system, *(texts[name] for name, _ in s.weights)])
    weighted = [(texts[name], weight) for name, weight in s.weights] if s.method in PARAMS else []
    requests = []
    for seed, question in enumerate(questions):
        prompt, preferences = chat_prompts(base.tokenizer, question, weighted, system)
        params = replace(common.params, seed=seed)
        requests.append(replace(common, prompt=prompt, preferences=preferences, params=params))
    return requests


def _paths(
    config: Config,
    prompts: Sequence[Prompt],
    samples: Mapping[str, int],
    texts: Mapping[str, str],
    models: Sequence[EvaluatedModel],
    settings: Sequence[Setting],
) -> dict[Setting, str]:
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(template(config).params),
        "rewards": {s.objective: config.objectives[s.objective].model_dump(mode="json") for s in models},
    }
    fingerprints = {model.objective: model.fingerprint for model in models}

    def inputs(s: Setting) -> dict[str, Any]:
        steering: dict[str, Any] = {"sentences": [texts[name] for name, _ in s.weights]}
        if s.method == TRAINED:
            steering = {"models": [fingerprints[name] for name, _ in s.weights], **config.steer.model_dump(mode="json")}
        if s.method in PARAMS:
            steering["params"] = asdict(PARAMS[s.method])
        return {**common, **steering, "samples": samples.get(s.method, 1), "weights": s.weights}

    return {s: result_path("words", s.name.replace(" ", "-"), inputs(s)) for s in settings}
