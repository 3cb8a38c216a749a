"""Measures finished runs: every iteration of a study, and the variants of iteration 0. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.common.result_cache import EvaluatedModel, evaluated_model
from benchmarks.study import answers_by_beta, value_error
from benchmarks.study.conditions import describe
from benchmarks.study.figures import Errors, Results, Row, Scored, compare, error_difference, middle, score
from benchmarks.study.variants import Variant
from mavis_dist.config import Config
from mavis_dist.store import layout
from mavis_dist.store.files import Store

REFERENCE = "as configured"


def measure(config: Config, variants: Sequence[Variant], betas: Sequence[float]) -> Results:
    """All figures of finished runs; needs no cluster.

    Args:
        betas: ascending strengths; iteration 0 at the middle one sets the KL at which gains are compared.

    Raises:
        StoreError: a value model is not finished.
    """
    store = Store(config.storage, config.run)
    chains = {name: iterations_of(config, store, name) for name in config.objectives}
    changed = {name: variants_of(config, name, variants) for name in config.objectives}
    models = [one for family in (*chains.values(), *changed.values()) for one in family]
    answers = answers_by_beta.measure(config, store, models, betas)
    scored = {one.name: score(answers, one, betas) for one in models}
    kl = {name: scored[chain[0].name].strengths[middle(betas)].divergence for name, chain in chains.items()}
    return Results(
        conditions=describe(config, betas),
        kl=kl,
        middle_beta=betas[middle(betas)],
        iterations=[row for name in chains for row in iteration_rows(config, store, chains[name], scored, kl[name])],
        variants=[
            row
            for name in chains
            if changed[name]
            for row in variant_rows(config, store, chains[name][0], changed[name], scored, kl[name])
        ],
    )


def iterations_of(config: Config, store: Store, objective: str) -> list[EvaluatedModel]:
    return [evaluated_model(store, objective, str(i), f"iteration {i}", i) for i in range(config.iterations)]


def variants_of(config: Config, objective: str, variants: Sequence[Variant]) -> list[EvaluatedModel]:
    stores = [Store(config.storage, variant.config(config).run) for variant in variants]
    return [evaluated_model(store, objective, v.name, v.label) for store, v in zip(stores, variants, strict=True)]


def iteration_rows(
    config: Config, store: Store, chain: Sequence[EvaluatedModel], scored: Mapping[str, Scored], kl: float
) -> list[Row]:
    """One objective's iterations, each against the first and against the one before it."""
    labels = [one.label for one in chain]
    others = {label: list(dict.fromkeys([labels[0], labels[i]])) for i, label in enumerate(labels[1:])}
    rows = compare(chain, scored, kl, others, [errors(config, store, one) for one in chain])
    gates = [store.metadata(layout.gate_folder(one.objective, one.iteration)) for one in chain]
    return [replace(row, gate=gate) for row, gate in zip(rows, gates, strict=True)]


def variant_rows(
    config: Config,
    store: Store,
    first: EvaluatedModel,
    changed: Sequence[EvaluatedModel],
    scored: Mapping[str, Scored],
    kl: float,
) -> list[Row]:
    """One objective's iteration 0 as the reference, and its variants against it, on the same held-out trees."""
    family = [replace(first, label=REFERENCE), *changed]
    measured = [value_error.measure(config, store, one) for one in family]
    others = {one.label: [REFERENCE] for one in changed}
    reference, *rows = compare(family, scored, kl, others, [figures(one) for one in measured])
    differences = [error_difference(one, measured[0]) for one in measured[1:]]
    return [
        reference,
        *(replace(row, error_over=difference) for row, difference in zip(rows, differences, strict=True)),
    ]


def errors(config: Config, store: Store, model: EvaluatedModel) -> Errors:
    """Validation error and R² as stored by the training, else computed."""
    metadata = store.metadata(layout.value_folder(model.objective, model.iteration)) or {}
    if "validation_error" in metadata:
        return metadata["validation_error"], metadata["explained_variance"]
    return figures(value_error.measure(config, store, model))


def figures(measured: value_error.HeldOut | None) -> Errors:
    return (measured.error, measured.r2) if measured else (None, None)
