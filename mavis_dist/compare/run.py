"""The comparison of methods of steering: computes the cells that are missing, then figures and a report from all.

Needs a finished run. Without anything missing, it needs no cluster and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np

from mavis_dist import cluster
from mavis_dist.actors import WorkerPool
from mavis_dist.compare import archive
from mavis_dist.compare.archive import Collected
from mavis_dist.compare.cells import Cell, Weights, plan_cells, read
from mavis_dist.compare.figures import reference_of, summarise
from mavis_dist.compare.judged import check_judge, judge
from mavis_dist.compare.measured import Measured
from mavis_dist.compare.method import Method, make_methods
from mavis_dist.compare.report import examples_of, write_report
from mavis_dist.compare.results import Comparison, Judged, TrainingCost
from mavis_dist.compare.worker import Finished, worker_starter
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.core.limit import largest_divergence
from mavis_dist.environment import versions
from mavis_dist.evaluate import base_answers
from mavis_dist.models.load import fingerprints
from mavis_dist.pipeline import score_base
from mavis_dist.progress import metered, say
from mavis_dist.prompts import load_prompts
from mavis_dist.run_state import check_same_run, open_run
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import UserError

STAGE = "compare"
PACKAGES = ("mavis-dist", "torch", "transformers", "ray", "moocore")


def compare(config: Config, answers: Path | None = None, sources: Sequence[Path] = ()) -> tuple[Comparison, str]:
    """The figures of a comparison, and the path of its page in the run's folder.

    Args:
        answers: a file to keep all answers in (`archive`).
        sources: such files, from which the figures are made instead of the run; a judge takes no part then.

    Raises:
        UserError: before anything is computed, naming what is missing or cannot be used.
        Stopped: after SIGTERM or SIGINT; finished cells are saved.
    """
    collected = archive.load(sources) if sources else collect(config)
    if answers is not None:
        archive.save(collected, answers)
    return conclude(config, collected, has_judge=not sources)


def conclude(config: Config, collected: Collected, has_judge: bool) -> tuple[Comparison, str]:
    """Figures and page."""
    workspace, measured = Workspace(config), collected.measured
    judged: dict[str, Judged] = {}
    if has_judge and config.compare.judge is not None:
        reference = reference_of(measured.methods)
        judged = judge(config.compare.judge, workspace, measured, collected.prompts, reference)
    comparison = summarise(measured, collected.training, collected.conditions, judged)
    workspace.store.write_json(layout.COMPARISON_FILE, comparison.to_json())
    shown = examples_of(measured, collected.prompts)
    return comparison, write_report(config, workspace.store, comparison, shown)


def collect(config: Config) -> Collected:
    """All answers of a comparison; those that are missing are computed."""
    if config.evaluate.limit_answers == 0:
        raise UserError(
            "config key 'evaluate.limit_answers' is 0: many answers of the base model are what gains and the limit of "
            "steering are measured from; set it to 64"
        )
    workspace = Workspace(config)
    check_same_run(workspace.store, config)
    scales = workspace.scales  # of the run's value models: it is finished
    methods = make_methods(config.compare, workspace)
    if not any(method.is_steered for method in methods.values()):
        raise UserError("config key 'compare.methods' has no method to compare with the base model: add one")
    _, prompts = load_prompts(config.prompts, config.seed)
    base, _ = fingerprints(config.base.model)
    cells = plan_cells(config, methods, prompts, base)
    missing = [cell for cell in cells if not workspace.store.exists(cell.path)]
    largest = largest_divergence(config.evaluate.limit_answers)
    if config.compare.kl > largest:
        answers = f"evaluate.limit_answers={config.evaluate.limit_answers}"
        say(STAGE, f"shares of the limit are unknown at {config.compare.kl:g} nats: {answers} reach {largest:.2f}")
    say(STAGE, f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before")
    settings = config.compare.judge
    if settings is not None and missing:
        check_judge(settings, workspace)
    if missing or not is_base_scored(config, workspace.store):
        compute(config, missing)
    measured = Measured(
        cells={cell: read(workspace.store, cell, prompts) for cell in cells},
        base_PN={
            name: (base_rewards(config, workspace.store, name) - scale.mean) / scale.sd
            for name, scale in scales.items()
        },
        scales=scales,
        kl=config.compare.kl,
    )
    training = {name: training_of(method, measured.common(name)) for name, method in methods.items()}
    return Collected(measured, prompts, training, describe(config))


def training_of(method: Method, vectors: Sequence[Weights]) -> TrainingCost:
    """What a method takes before its first answer, for all weights and for one of these vectors."""
    whole, each = method.training(), [method.training_for(dict(weights)) for weights in vectors]
    return TrainingCost(
        seconds=whole.seconds,
        seconds_per_weights=fmean(one.seconds for one in each),
        tokens=whole.tokens,
        tokens_per_weights=fmean(one.tokens for one in each),
        machines=sorted(whole.machines),
    )


def is_base_scored(config: Config, store: Store) -> bool:
    """Whether the base model's answers for the limit of steering are stored, with their rewards."""
    folders = [layout.LIMIT_FOLDER, *(layout.limit_reward_folder(name) for name in config.objectives)]
    return all(store.metadata(folder) == {"answers": config.evaluate.limit_answers} for folder in folders)


def base_rewards(config: Config, store: Store, objective: str) -> np.ndarray:
    """Raw rewards [P, N] of the base model's answers."""

    def unfinished() -> list[list[float]]:
        raise StoreError(f"{store.root}/{folder} is not finished")

    folder = layout.limit_reward_folder(objective)
    return np.array(base_answers.cached(store, folder, config.evaluate.limit_answers, unfinished))


def compute(config: Config, missing: Sequence[Cell]) -> None:
    """Answer the prompts of all missing cells on a cluster, after the answers of the base model."""
    cluster.connect()
    with cluster.stop_on_signals():
        state = open_run(config)
        try:
            score_base(state)
        finally:
            state.release_workers()
        lists = [list(cells) for _, cells in groupby(missing, key=lambda cell: (cell.method, cell.seed))]
        workers = worker_starter(config)
        pool: WorkerPool[None, list[Cell], Finished] = WorkerPool(workers.start, config.rollout.actors, workers.stop)
        try:
            for _ in metered(pool.run(STAGE, None, lists), STAGE, "cells", len(missing)):
                pass
        finally:
            pool.release()


def describe(config: Config) -> dict[str, str]:
    """Topic -> one line of text."""
    compare, steer, rollout = config.compare, config.steer, config.rollout
    judged = {}
    if compare.judge is not None:
        judged["judge"] = f"{compare.judge.model}, the first {compare.judge.prompts} prompts, every pair in both orders"
    return {
        "base model": f"{config.base.model}, {config.base.dtype}; system prompt: {config.base.system!r}",
        "objectives": ", ".join(f"{name} ({spec.reward})" for name, spec in config.objectives.items()),
        "prompts": f"{config.prompts.evaluation} unseen, answers of at most {rollout.max_tokens} tokens, "
        f"top-k {rollout.top_k}",
        "weights": f"{compare.weights} per pair, corners included, and those inside triples",
        "seeds": f"{compare.seeds}; every method answers a prompt with the same ones",
        "steering": f"tilt of at most {steer.tilt_cap} nats per token, residual cap {steer.residual_cap}",
        "limit": f"from {config.evaluate.limit_answers} answers of the base model to every prompt; known up to "
        f"{largest_divergence(config.evaluate.limit_answers):.2f} nats",
        **judged,
        "hypervolume": "of mean gains in standard deviations; reference point: the base model (0 in every objective)",
        "versions": ", ".join(f"{name} {number}" for name, number in versions(PACKAGES).items()),
    }
