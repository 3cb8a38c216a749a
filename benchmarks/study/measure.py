"""Measures finished runs: a study's value models alone and mixed, its variants and its iterations. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from benchmarks.common.result_cache import EvaluatedModel, evaluated_model
from benchmarks.study import answers_by_beta, decode_speed, sibling_answers, text_quality
from benchmarks.study.answers_by_beta import BASE
from benchmarks.study.conditions import describe
from benchmarks.study.figures import Cost, Measured, Results, Row, Steered, Validation, nearest, row_of
from benchmarks.study.sibling_answers import BaseAnswers
from benchmarks.study.text_quality import Spread, TextRatios
from benchmarks.study.variants import Variant
from mavis_dist.config import Config
from mavis_dist.core import siblings
from mavis_dist.core.siblings import SiblingTest
from mavis_dist.evaluate import base_answers
from mavis_dist.evaluate.collect import stage_seconds
from mavis_dist.evaluate.sweep import Estimate, grid, limit_curve
from mavis_dist.models.load import chat_ids, load_tokenizer
from mavis_dist.prompts import load_prompts
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import R2_KEY, UserError

REFERENCE = "as configured"
PAIR_STEPS = 5  # weights of a pair: 1, .75, .5, .25, 0
FIT_STAGE = "train i0"
TEXT_CORPORA = 8  # of the base model


def check(config: Config) -> None:
    """Raises UserError if the run would not measure the limit of steering."""
    if config.evaluate.limit_answers == 0:
        raise UserError(
            "config key 'evaluate.limit_answers' is 0: the study measures shares of the limit of steering, which many "
            "answers of the base model tell; set it to 64"
        )


def measure(config: Config, variants: Sequence[Variant], betas: Sequence[float], kl: float) -> Results:
    """All figures of finished runs; needs no cluster.

    Args:
        betas: ascending strengths.
        kl: nats at which gains are compared.

    Raises:
        StoreError: a value model, or the answers of the base model, are not finished.
    """
    check(config)
    store = Store(config.storage, config.run)
    reference = {name: evaluated_model(store, name, "0", REFERENCE) for name in config.objectives}
    points = points_of(reference)
    changed = [alone for variant in variants for alone in variant_of(config, variant)]
    chains = [chain_of(config, store, name) for name in config.objectives] if config.iterations > 1 else []
    everything = [*points, *changed, *(alone for chain in chains for alone in chain)]
    models = {model.name: model for steered in everything for model, _ in steered.models}
    settings = dict.fromkeys(steered.setting(beta) for steered in everything for beta in betas)
    measured = Measured(
        answers=answers_by_beta.measure(config, store, list(models.values()), [BASE, *settings]),
        base_PN={name: base_rewards(config, store, model) for name, model in reference.items()},
        scales={name: model.scale for name, model in reference.items()},
        betas=betas,
        kl=kl,
    )
    alone = {steered.name: steered for steered in points if len(steered.models) == 1}
    stores = {variant.label: Store(config.storage, variant.config(config).run) for variant in variants}
    base = answers_of_base(config, store, measured)

    def told(one: Steered, trained: Store, iteration: int = 0) -> Validation:
        return validation(trained, one, iteration, sibling_answers.measure(config, store, one.models[0][0], base))

    rows = [row_of(measured, one, validation=told(one, store) if one.name in alone else None) for one in points]
    costs = {REFERENCE: cost(config, store, REFERENCE, list(reference.values()), base.prompts)}
    for variant in variants:
        of_all = [model for one in changed if one.label == variant.label for model, _ in one.models]
        costs[variant.label] = cost(config, stores[variant.label], variant.name, of_all, base.prompts)
    text, text_base = text_of(config, store, measured, points, rows)
    return Results(
        conditions=describe(config, betas),
        kl=kl,
        num_prompts=config.prompts.evaluation,
        limits={name: limit_curve(rewards_PN) for name, rewards_PN in measured.base_PN.items()},
        points=rows,
        variants=[row_of(measured, one, [alone[one.name]], told(one, stores[one.label])) for one in changed],
        iterations=[found for chain in chains for found in iteration_rows(store, measured, chain, told)],
        costs=costs,
        text=text,
        text_base=text_base,
    )


def points_of(models: dict[str, EvaluatedModel]) -> list[Steered]:
    """Every objective alone, pairs at quarters, and triples at thirds."""
    weights = {point.name: dict(point.weights) for point in grid(list(models), PAIR_STEPS) if point.weights}
    for three in combinations(models, 3):
        weights[" + ".join(f"1/3 {name}" for name in three)] = dict.fromkeys(three, 1 / 3)
    return [
        Steered(point, REFERENCE, tuple((models[name], weight) for name, weight in shares.items()))
        for point, shares in weights.items()
    ]


def variant_of(config: Config, variant: Variant) -> list[Steered]:
    """A variant's value model of every objective alone."""
    store = Store(config.storage, variant.config(config).run)
    models = [evaluated_model(store, name, variant.name, variant.label) for name in config.objectives]
    return [Steered(model.objective, variant.label, ((model, 1.0),)) for model in models]


def chain_of(config: Config, store: Store, objective: str) -> list[Steered]:
    """All iterations of an objective."""
    models = [evaluated_model(store, objective, str(i), f"iteration {i}", i) for i in range(config.iterations)]
    return [Steered(objective, model.label, ((model, 1.0),)) for model in models]


def iteration_rows(
    store: Store, measured: Measured, chain: Sequence[Steered], told: Callable[[Steered, Store, int], Validation]
) -> list[Row]:
    """One objective's iterations, each against the first and against the one before it."""
    rows = []
    for i, steered in enumerate(chain):
        others = [] if i == 0 else [chain[0]] if i == 1 else [chain[0], chain[i - 1]]
        gate = store.metadata(layout.gate_folder(steered.name, i))
        rows.append(row_of(measured, steered, others, told(steered, store, i), gate))
    return rows


def validation(store: Store, steered: Steered, iteration: int, tests: Mapping[int, SiblingTest]) -> Validation:
    """R² and its ceiling as the training stored them, and the sibling test on the unseen prompts."""
    metadata = store.metadata(layout.value_folder(steered.name, iteration)) or {}
    return Validation(
        metadata.get(R2_KEY),
        metadata.get(siblings.CEILING_KEY),
        {n: Estimate(*test.slope) for n, test in tests.items()},
        {n: Estimate(*test.correlation) for n, test in tests.items()},
    )


def cost(
    config: Config, store: Store, name: str, models: Sequence[EvaluatedModel], prompts: Sequence[tuple[int, ...]]
) -> Cost:
    """Of the value models of all objectives of one run; `name` is in file names."""
    return Cost(
        stage_seconds(store).get(FIT_STAGE),
        decode_speed.measure(config, store, name.replace(" ", "-"), models, prompts),
    )


def answers_of_base(config: Config, store: Store, measured: Measured) -> BaseAnswers:
    """The answers that tell the limit of steering, with their prompts and rewards."""
    _, prompts = load_prompts(config.prompts, config.seed)
    tokenizer = load_tokenizer(config.base.model)
    tokens = [tuple(chat_ids(tokenizer, prompt.messages, config.base.system)) for prompt in prompts]
    return BaseAnswers(tokens, base_texts(config, store), measured.base_PN)


def base_texts(config: Config, store: Store) -> list[list[str]]:
    folder, num = layout.LIMIT_FOLDER, config.evaluate.limit_answers
    return base_answers.cached(store, folder, num, lambda: _unfinished(store, folder))


def base_rewards(config: Config, store: Store, model: EvaluatedModel) -> np.ndarray:
    """Rewards [P, N] of the base model's answers to the unseen prompts, sd above the mean of training answers."""
    folder, num = layout.limit_reward_folder(model.objective), config.evaluate.limit_answers
    scores_PN = np.array(base_answers.cached(store, folder, num, lambda: _unfinished(store, folder)))
    return (scores_PN - model.scale.mean) / model.scale.sd


def text_of(
    config: Config, store: Store, measured: Measured, points: Sequence[Steered], rows: Sequence[Row]
) -> tuple[dict[str, TextRatios], dict[str, Spread]]:
    """The text of every point at the strength nearest to the KL over the base model's, and the base model's own."""
    _, prompts = load_prompts(config.prompts, config.seed)
    texts, num = base_texts(config, store), config.evaluate.limit_answers
    base = {f"base {n}": [answers[n] for answers in texts] for n in range(min(TEXT_CORPORA, num))}
    strengths = {found.name: nearest(found, measured.kl) for found in rows}
    steered = {one.name: measured.answers[one.setting(strengths[one.name].beta)].text for one in points}
    found = text_quality.measure(config, store, prompts, {**base, **steered})
    spreads = text_quality.spreads([found[name] for name in base])
    ratios = {
        name: text_quality.ratios(strength.beta, strength.divergence, found[name], spreads)
        for name, strength in strengths.items()
    }
    return ratios, spreads


def _unfinished(store: Store, folder: str) -> list[list[str]]:
    raise StoreError(f"{store.root}/{folder} is not finished: run the pipeline first")
