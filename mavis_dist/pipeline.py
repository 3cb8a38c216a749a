"""The algorithm on one page (arXiv 2508.13415): grow trees, label them, fit values, again with the tilted policies.

Every stage is a function of the config and of finished stages. It writes whole files, its marker last, and is skipped
when the marker is there: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from mavis_dist import cluster
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.decode import SamplingParams
from mavis_dist.evaluate import sweep as sweeping
from mavis_dist.evaluate.collect import record_stage, write_report
from mavis_dist.evaluate.sweep import Sweep
from mavis_dist.models.load import fetch, fingerprint_model, fingerprint_tokenizer, load_tokenizer
from mavis_dist.models.value import load_card
from mavis_dist.plan import Plan, make_plan
from mavis_dist.prompts import load_prompts
from mavis_dist.rewards import build
from mavis_dist.rollout.labels import label_shards, reward_scale
from mavis_dist.rollout.worker import start_workers
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.train.data import label_folder, rollout_folder, shard_names
from mavis_dist.train.fit import Fit
from mavis_dist.train.parallel import fit_all
from mavis_dist.types import Policy, Prompt, RewardScale


@dataclass(frozen=True)
class Run:
    """What every stage needs."""

    config: Config
    store: Store
    plan: Plan
    board: Any
    train: list[Prompt]
    evaluation: list[Prompt]

    @property
    def validation_ids(self) -> frozenset[str]:
        """The prompts that measure the value models: the last ones of the training set."""
        count = self.config.prompts.validation
        return frozenset(prompt.id for prompt in self.train[len(self.train) - count :])


def run(config: Config) -> Sweep:
    """Everything, from prompts to published value models; returns the sweep over weights on unseen prompts."""
    state = open_run(config)
    for iteration in range(config.iterations):
        policies = policies_of(config, iteration)
        grow(state, iteration, policies)
        label(state, iteration, policies)
        fit(state, iteration)
    sweep = evaluate(state)
    publish(state)
    page = write_report(state.store, config, config_module.flatten(config), sweep)
    say("report", page)
    return sweep


def open_run(config: Config) -> Run:
    """Refuse what cannot work before anything is written; needs a connected cluster."""
    store = Store(config.storage, config.run)
    plan = make_plan(config, cluster.nodes())
    train, evaluation = load_prompts(config.prompts, config.seed)
    fetch(config.base.model)
    for objective in config.objectives.values():
        build(objective)
    store.check_writable()
    if store.exists("run.yaml"):
        started = config_module.parse(yaml.safe_load(store.read_bytes("run.yaml")))
        if conflicts := config_module.conflicts(started, config):
            raise config_module.ConfigError(conflicts[0])
    store.write_bytes("run.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    for note in plan.notes:
        say("plan", note)
    return Run(config, store, plan, cluster.make_board(), train, evaluation)


def policies_of(config: Config, iteration: int) -> list[Policy]:
    """Iteration 0 samples the base model; later ones sample each objective's own tilted policy."""
    return [Policy()] if iteration == 0 else [Policy(name, iteration) for name in config.objectives]


def grow(state: Run, iteration: int, policies: Sequence[Policy]) -> None:
    """Trees of every policy on all training prompts, shard by shard."""
    stage, size = f"rollouts i{iteration}", state.config.rollout.prompts_per_shard
    todo = [policy for policy in policies if not finished(state, rollout_folder(policy), stage)]
    shards = []
    for policy in todo:
        for start in range(0, len(state.train), size):
            path = f"{rollout_folder(policy)}/part-{start // size:05d}.parquet"
            if not state.store.exists(path):
                shards.append((stage, policy, state.train[start : start + size], path))
    if shards:
        iterations = {policy.objective: iteration - 1 for policy in todo if policy.objective}
        count = min(state.plan.rollout_actors, len(shards))
        workers = workers_with(state, count, iterations)
        num_trees = sum(len(prompts) for _, _, prompts, _ in shards)
        watch = cluster.Watch(state.board, stage, "trees", num_trees)
        with timed(state, stage, f"{num_trees} trees"):
            cluster.map_on_actors(workers, lambda worker, shard: worker.grow.remote(*shard), shards, watch)
        cluster.release(workers)
    for policy in todo:
        state.store.finish(rollout_folder(policy), {"trees": len(state.train)})


def label(state: Run, iteration: int, policies: Sequence[Policy]) -> None:
    """Rewards of all leaves: every objective scores the base model's trees, and the trees of its own policy."""
    stage = f"labels i{iteration}"
    pairs = [
        (policy, name) for policy in policies for name in state.config.objectives if policy.objective in (None, name)
    ]
    todo = [pair for pair in pairs if not finished(state, label_folder(*pair), stage)]
    tasks = []
    for policy, name in todo:
        source, target = rollout_folder(policy), label_folder(policy, name)
        shards = [(f"{source}/{shard}", f"{target}/{shard}") for shard in shard_names(state.store, source)]
        tasks.append((state.config, name, state.train, shards))
    if not tasks:
        return
    with timed(state, stage, f"{len(tasks)} sets of leaves"):
        counts = cluster.map_tasks(label_shards, tasks, stage, "sets of leaves")
    for (policy, name), count in zip(todo, counts, strict=True):
        state.store.finish(label_folder(policy, name), {"leaves": count})


def fit(state: Run, iteration: int) -> None:
    """One value model per objective, all objectives at the same time."""
    stage = f"train i{iteration}"
    fits = [
        Fit(name, iteration, scale_of(state, name), state.validation_ids)
        for name in state.config.objectives
        if not finished(state, values.folder(name, iteration), stage)
    ]
    if not fits:
        return
    with timed(state, stage, f"{len(fits)} value models, {state.plan.fits_at_once} at a time"):
        fit_all(fits, state.config, state.plan.fits_at_once, state.board)


def scale_of(state: Run, objective: str) -> RewardScale:
    """The unit of an objective: its mean and spread over the base model's answers to the training prompts."""
    folder = label_folder(Policy(), objective)
    paths = [f"{folder}/{name}" for name in shard_names(state.store, folder)]
    training = {prompt.id for prompt in state.train} - state.validation_ids
    return reward_scale(state.store, objective, paths, training)


def evaluate(state: Run) -> Sweep:
    """Answers to unseen prompts under every weight of the grid, with the newest value models."""
    config, folder, stage = state.config, "eval/sweep", "evaluate"
    newest = dict.fromkeys(config.objectives, config.iterations - 1)
    inputs = {"values": newest, "evaluate": config.evaluate.model_dump(mode="json")}
    if state.store.facts(folder) == inputs:
        say(stage, "finished before, skipped")
        return sweeping.sweep_from_json(state.store.read_json(f"{folder}/sweep.json"))

    points = sweeping.grid(list(config.objectives), config.evaluate.grid)
    params = SamplingParams(
        config.rollout.max_tokens,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        min_p=config.rollout.min_p,
        n=config.evaluate.samples,
    )
    steer = config.steer
    workers = workers_with(state, min(state.plan.rollout_actors, len(points)), newest)
    num_answers = len(points) * len(state.evaluation) * config.evaluate.samples
    batches = [
        (point.name, sweeping.requests(point, state.evaluation, steer.beta, steer.tilt_cap, params)) for point in points
    ]
    watch = cluster.Watch(state.board, stage, "prompts", len(points) * len(state.evaluation))

    def ask(worker: Any, batch: tuple[str, Any]) -> Any:
        return worker.answer.remote(stage, *batch)

    with timed(state, stage, f"{num_answers} answers"):
        answers = dict(cluster.map_on_actors(workers, ask, batches, watch))
    cluster.release(workers)
    scores = {point.name: score_all(state, answers[point.name]) for point in points}
    scales = {name: scale_of(state, name) for name in config.objectives}
    result = sweeping.summarise(points, answers, scores, scales, state.evaluation, steer.beta)
    state.store.write_json(f"{folder}/sweep.json", result.to_json())
    state.store.finish(folder, inputs)
    return result


def workers_with(state: Run, count: int, value_iterations: Mapping[str, int]) -> list[Any]:
    """Workers with these value models; models that were trained for another base are refused here, not in an actor."""
    model = state.config.base.model
    base, tokenizer = fingerprint_model(fetch(model)), fingerprint_tokenizer(load_tokenizer(model))
    for name, iteration in value_iterations.items():
        load_card(values.fetch(state.store, name, iteration)).check(base, tokenizer)
    return start_workers(state.config, count, value_iterations, state.board)


def score_all(state: Run, answers: Sequence[Sequence[tuple[Any, str]]]) -> dict[str, list[float]]:
    """Raw rewards of all answers by objective, prompt by prompt."""
    prompts = [prompt.text for prompt, row in zip(state.evaluation, answers, strict=True) for _ in row]
    texts = [text for row in answers for _, text in row]
    return {name: build(spec).score(prompts, texts) for name, spec in state.config.objectives.items()}


def publish(state: Run) -> None:
    """Make the newest value models the ones that are served."""
    for name in state.config.objectives:
        values.publish(state.store, name, state.config.iterations - 1)


@contextmanager
def timed(state: Run, stage: str, detail: str) -> Iterator[None]:
    """Remember how long the work of a stage took, for the report."""
    started = time.monotonic()
    yield
    record_stage(state.store, stage, time.monotonic() - started, detail)


def finished(state: Run, folder: str, stage: str) -> bool:
    if state.store.facts(folder) is None:
        return False
    say(stage, f"{folder} finished before, skipped")
    return True


def say(stage: str, text: str) -> None:
    print(f"{stage:<24} {text}", file=sys.stderr, flush=True)
