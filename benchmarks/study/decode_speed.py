"""How fast answers are when all objectives of a run steer them, beside those of the base model alone. No Ray."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.common.engines import load_engine, template
from benchmarks.common.interleave import ratio, take_turns
from benchmarks.common.result_cache import EvaluatedModel, result_path
from mavis_dist.config import Config
from mavis_dist.decode import Engine, Request, Scorer
from mavis_dist.store.files import Store

ROWS = 16  # concurrent requests
REPETITIONS = 5


@dataclass(frozen=True)
class DecodeSpeed:
    """Medians over the repetitions; times include the prompts."""

    tokens_per_s: float
    over_unguided: float  # that of the base model alone in the same engine


def measure(
    config: Config, store: Store, name: str, models: Sequence[EvaluatedModel], prompts: Sequence[tuple[int, ...]]
) -> DecodeSpeed:
    """The speed of lazy scoring with all models at equal weights and the run's beta; a stored one is read.

    Args:
        name: of the models, in file names.
        prompts: token ids.
    """
    common = replace(template(config), scorer=Scorer.LAZY)
    inputs = {
        "base": config.base.model_dump(mode="json"),
        "value_models": [model.fingerprint for model in models],
        "objectives": [model.objective for model in models],
        "params": asdict(common.params),
        "beta": config.steer.beta,
        "tilt_cap": config.steer.tilt_cap,
    }
    path = result_path("speed", name, inputs)
    if not store.exists(path):
        _, engine = load_engine(config, models)
        weights = {model.name: 1 / len(models) for model in models}
        asked = [replace(common, prompt=prompt) for prompt in prompts[:ROWS]]
        guided = [replace(request, weights=weights, beta=config.steer.beta) for request in asked]
        variants = {
            "unguided": lambda seed: _answer(engine, asked, seed),
            "guided": lambda seed: _answer(engine, guided, seed),
        }
        for warm_up in variants.values():
            warm_up(0)
        per_s = take_turns(variants, REPETITIONS).per_s
        found = DecodeSpeed(statistics.median(per_s["guided"]), ratio(per_s["guided"], per_s["unguided"]))
        store.write_json(path, asdict(found))
        print(f"{'speed':<24} {name}", file=sys.stderr, flush=True)
    return DecodeSpeed(**store.read_json(path))


def _answer(engine: Engine, requests: Sequence[Request], seed: int) -> float:
    """The number of tokens of all answers."""
    seeded = [
        replace(request, id=str(i), params=replace(request.params, seed=seed * len(requests) + i))
        for i, request in enumerate(requests)
    ]
    return sum(len(choice.tokens) for choices in engine.generate(seeded) for choice in choices)
