"""Answers to unseen prompts under sentences, value models and prompts, over the weights of pairs of objectives. No Ray.

Lists are P long: one entry per prompt and sample.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

from benchmarks.common.answers import Answers, answer, scored
from benchmarks.common.engines import load_engine, template
from benchmarks.common.result_cache import Subject, cell_path
from benchmarks.common.sentences import SENTENCES
from benchmarks.steerability.first_person import first_person
from mavis_dist.config import Config
from mavis_dist.decode import PRESETS, PreferenceParams, Request, chat_prompts
from mavis_dist.models.load import BaseModel
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, RewardScale, UserError

# An objective that nobody has trained for: sentences do without.
PERSONAL, PERSONAL_SENTENCE = "personal", "Write about yourself, in the first person."
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
    """Who steers towards what; equal ones write the same answers."""

    way: str  # a key of PARAMS, or one of the other ways
    weights: tuple[tuple[str, float], ...] = ()  # of the objectives, those above 0

    @property
    def name(self) -> str:
        return " ".join([self.way, *(f"{weight:g} {objective}" for objective, weight in self.weights)])


def setting(way: str, pair: tuple[str, str], weight: float) -> Setting:
    """The setting of a way for a pair whose first objective has this weight."""
    if way == PLAIN:
        return Setting(PLAIN)
    if way == PROMPTED:
        return Setting(PROMPTED, tuple((name, 1.0) for name in pair))
    shares = ((pair[0], weight), (pair[1], round(1 - weight, 10)))
    weights = tuple((name, share) for name, share in shares if share > 0)
    if len(weights) == 1 and way in PARAMS:  # a single sentence always has all the weight
        way = next(w for w, params in PARAMS.items() if params.strength == PARAMS[way].strength)
    return Setting(way, weights)


@dataclass(frozen=True)
class Measured:
    """All answers, and what is needed to read them."""

    config: Config
    scales: dict[str, RewardScale]  # of the run's objectives and, of these answers of the base model, of PERSONAL
    weights: tuple[float, ...]
    num_prompts: int
    samples: Mapping[str, int]  # answers per prompt, by way; one where it is not named
    answers: dict[Setting, Answers]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.scales, 2))

    def has(self, way: str, pair: tuple[str, str]) -> bool:
        """Nothing is trained for some pairs."""
        return setting(way, pair, self.weights[0]) in self.answers


def measure(
    config: Config, store: Store, weights: Sequence[float], num_prompts: int, samples: Mapping[str, int]
) -> Measured:
    """Answers for every pair, way and weight, those already in the store from there; `samples` as in Measured.

    Raises:
        UserError: the run has fewer than two objectives that a sentence is known for.
    """
    sentences = {name: SENTENCES[spec.reward] for name, spec in config.objectives.items() if spec.reward in SENTENCES}
    if len(sentences) < 2:
        raise UserError(
            f"run {config.run!r} has no two objectives of {', '.join(SENTENCES)}: use jobs/configs/study.yaml"
        )
    published = values.published(store)
    if missing := sorted(sentences.keys() - published.keys()):
        raise UserError(f"run {config.run!r} has published no value model of {', '.join(missing)}: finish it first")
    subjects = [Subject(n, n, n, published[n], values.fetch(store, n, published[n])) for n in sentences]
    sentences[PERSONAL] = PERSONAL_SENTENCE
    prompts = load_prompts(config.prompts, config.seed)[1][:num_prompts]
    settings = _settings(list(combinations(sentences, 2)), weights)
    paths = _paths(config, prompts, samples, sentences, subjects, settings)
    todo = [s for s in settings if not store.exists(paths[s])]
    questions = {s: [p.text for p in prompts for _ in range(samples.get(s.way, 1))] for s in settings}
    if todo:
        base, engine = load_engine(config, subjects)
        rewards = {subject.objective: build(config.objectives[subject.objective]) for subject in subjects}
        asked = {s: _requests(s, config, base, questions[s], sentences) for s in todo}
        for done, (s, choices) in enumerate(answer(engine, asked), 1):
            store.write_json(paths[s], asdict(scored(choices, questions[s], rewards)))
            print(f"{'measure':<24} {done}/{len(todo)} settings: {s.name}", file=sys.stderr, flush=True)
    answers = {s: Answers(**store.read_json(path)) for s, path in paths.items()}
    for s, found in answers.items():
        found.reward[PERSONAL] = first_person(questions[s], found.text)
    plain = answers[Setting(PLAIN)].reward[PERSONAL]
    scales = {subject.objective: subject.scale for subject in subjects}
    scales[PERSONAL] = RewardScale(fmean(plain), pstdev(plain) or 1.0)
    return Measured(config, scales, tuple(weights), len(prompts), samples, answers)


def _settings(pairs: Sequence[tuple[str, str]], weights: Sequence[float]) -> list[Setting]:
    ways = (PLAIN, PROMPTED, TRAINED, *PARAMS)
    used = [(way, pair) for pair in pairs for way in ways if way != TRAINED or PERSONAL not in pair]
    return list(dict.fromkeys(setting(way, pair, weight) for way, pair in used for weight in weights))


def _requests(
    s: Setting, config: Config, base: BaseModel, questions: Sequence[str], sentences: Mapping[str, str]
) -> list[Request]:
    """One request per question, each with a seed of its own that is the same under all settings."""
    common, system = replace(template(config), beta=config.steer.beta), config.base.system
    if s.way == TRAINED:
        common = replace(common, weights=dict(s.weights))
    if s.way in PARAMS:
        common = replace(common, preference_params=PARAMS[s.way])
    if s.way == PROMPTED:
        system = "\n".join([system, *(sentences[name] for name, _ in s.weights)])
    requests = []
    for seed, question in enumerate(questions):
        worded = [(sentences[name], weight) for name, weight in s.weights] if s.way in PARAMS else []
        prompt, preferences = chat_prompts(base.tokenizer, question, worded, system)
        params = replace(common.params, seed=seed)
        requests.append(replace(common, prompt=prompt, preferences=preferences, params=params))
    return requests


def _paths(
    config: Config,
    prompts: Sequence[Prompt],
    samples: Mapping[str, int],
    sentences: Mapping[str, str],
    subjects: Sequence[Subject],
    settings: Sequence[Setting],
) -> dict[Setting, str]:
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(template(config).params),
        "rewards": {s.objective: config.objectives[s.objective].model_dump(mode="json") for s in subjects},
    }
    fingerprints = {subject.objective: subject.fingerprint for subject in subjects}

    def inputs(s: Setting) -> dict[str, Any]:
        steering: dict[str, Any] = {"sentences": [sentences[name] for name, _ in s.weights]}
        if s.way == TRAINED:
            steering = {"models": [fingerprints[name] for name, _ in s.weights], **config.steer.model_dump(mode="json")}
        if s.way in PARAMS:
            steering["params"] = asdict(PARAMS[s.way])
        return {**common, **steering, "samples": samples.get(s.way, 1), "weights": s.weights}

    return {s: cell_path("words", s.name.replace(" ", "-"), inputs(s)) for s in settings}
