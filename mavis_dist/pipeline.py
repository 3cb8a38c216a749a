"""The algorithm on one page (arXiv 2508.13415): grow trees, label them, fit values, repeat with the tilted policies.

Every stage depends only on the config and on finished stages. It writes whole files, its marker last, and is skipped if
the marker exists: a run that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from mavis_dist import cluster
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.evaluate import base_answers, gate
from mavis_dist.evaluate import sweep as sweeping
from mavis_dist.evaluate.collect import timed, write_report
from mavis_dist.evaluate.sweep import Sweep
from mavis_dist.plan import tasks_of
from mavis_dist.progress import metered, say
from mavis_dist.prompts import held_out
from mavis_dist.rollout.labels import label_shards
from mavis_dist.rollout.worker import Ask, Grow
from mavis_dist.run_state import (
    RunState,
    answer_params,
    ask,
    current,
    finished,
    open_run,
    pairs_of,
    scale_of,
    score,
    texts_of,
    work,
)
from mavis_dist.store import layout, values
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.store.shards import shard_names
from mavis_dist.store.tree_folder import TreeFolder
from mavis_dist.tasks import map_tasks
from mavis_dist.train.fit import Fit
from mavis_dist.train.launch import fit_all
from mavis_dist.types import Policy


def run(config: Config) -> Sweep:
    """Run all stages, from prompts to published value models; returns the sweep over weights on unseen prompts.

    Raises:
        Stopped: after SIGTERM or SIGINT; finished work is saved.
    """
    state = open_run(config)
    try:
        with cluster.stop_on_signals():
            for iteration in range(config.iterations):
                policies = policies_of(config, iteration)
                grow(state, iteration, policies)
                label(state, iteration, policies)
                fit(state, iteration)
                compare(state, iteration)
            sweep = evaluate(state)
    finally:
        state.release_workers()
    publish(state)
    page = write_report(state.store, config, config_module.flatten(config), sweep)
    say("report", page)
    return sweep


def policies_of(config: Config, iteration: int) -> list[Policy]:
    """Iteration 0 samples the base model; later ones sample each objective's own tilted policy."""
    return [Policy()] if iteration == 0 else [Policy(name, iteration) for name in config.objectives]


def grow(state: RunState, iteration: int, policies: Sequence[Policy]) -> None:
    """Grow the trees of every policy on all training prompts, and store them as they complete."""
    stage, size = f"rollouts i{iteration}", state.config.rollout.prompts_per_shard
    prompts = {prompt.id: prompt for prompt in state.train}
    folders = {
        policy: TreeFolder(state.store, rollout_folder(policy), list(prompts), size)
        for policy in policies
        if not finished(state, rollout_folder(policy), stage)
    }
    batches = [
        [Grow(policy, prompts[id_]) for id_ in ids] for policy, folder in folders.items() for ids in folder.missing
    ]
    models = {p.objective: current(state, p.objective, iteration) for p in folders if p.objective}
    num_trees = sum(map(len, batches))
    with timed(state.store, stage, f"{len(policies) * len(prompts)} trees", bool(batches)):
        results = work(state, stage, batches, models)
        for grown in metered(results, stage, "trees", num_trees, with_speed=True):
            folders[grown.policy].add(grown.tree)
    for folder in folders.values():
        folder.finish()


def label(state: RunState, iteration: int, policies: Sequence[Policy]) -> None:
    """Score all leaves: every objective scores the base model's trees and the trees of its own policy."""
    stage = f"labels i{iteration}"
    pairs = [
        (policy, name) for policy in policies for name in state.config.objectives if policy.objective in (None, name)
    ]
    todo = [pair for pair in pairs if not finished(state, label_folder(*pair), stage)]
    if not todo:
        return
    state.release_workers()  # labelling needs the cores of the rollout actors
    owners, tasks, names = [], [], {}
    for policy, name in todo:
        source, target = rollout_folder(policy), label_folder(policy, name)
        names[policy, name] = shard_names(state.store, source)
        shards = [(f"{source}/{shard}", f"{target}/{shard}") for shard in names[policy, name]]
        for part in tasks_of(shards, len(todo), cluster.nodes()):
            owners.append((policy, name))
            tasks.append((state.config, name, state.train, part))
    with timed(state.store, stage, f"{len(todo)} sets of leaves"):
        counts = map_tasks(label_shards, tasks, stage, "parts")
    for pair in todo:
        leaves = sum(count for owner, count in zip(owners, counts, strict=True) if owner == pair)
        state.store.finish(label_folder(*pair), {"leaves": leaves}, names[pair])


def fit(state: RunState, iteration: int) -> None:
    """Train one value model per objective, as many at a time as fit, or at first one for all of them."""
    stage = f"train i{iteration}"
    # The folder of the weights, so that a shared model that lost a file is trained again.
    folders = {
        name: values.model_folder(state.store, layout.value_folder(name, iteration)) for name in state.config.objectives
    }
    names = [name for name, folder in folders.items() if not finished(state, folder, stage)]
    if not names:
        return
    groups = [tuple(names)] if state.config.value.is_joint and iteration == 0 else [(name,) for name in names]
    fits = [
        Fit(
            group,
            iteration,
            current(state, group[0], iteration) if iteration > 0 else None,
            tuple(scale_of(state, name) for name in group),
            state.validation_ids,
        )
        for group in groups
    ]
    state.release_workers()
    with timed(state.store, stage, f"{len(fits)} value models, {min(len(fits), state.plan.fits_at_once)} at a time"):
        fit_all(fits, state.config, state.plan.fits_at_once, state.progress)


def compare(state: RunState, iteration: int) -> None:
    """Accept every first policy, and later ones by their soft value on the validation prompts."""
    stage, store = f"gate i{iteration}", state.store
    names = [
        name for name in state.config.objectives if not finished(state, layout.gate_folder(name, iteration), stage)
    ]
    found: dict[str, list[float]] = {}
    if iteration > 0:
        # What a first policy is worth is not known before there is another one to compare it with.
        unknown = gate.without_soft_values(store, {name: current(state, name, iteration) for name in names})
        for name, values_of_current in soft_values(state, stage, unknown).items():
            gate.add_soft_values(store, name, unknown[name], values_of_current)
        found = soft_values(state, stage, dict.fromkeys(names, iteration))
    for name in names:
        decision = gate.decide(store, name, iteration, found.get(name, []), state.config.gate.margin)
        say(stage, f"{name} iteration {iteration} {decision.verdict()}")


def soft_values(state: RunState, stage: str, iterations: Mapping[str, int]) -> dict[str, list[float]]:
    """By objective, the soft value of an iteration's policy on every validation prompt."""
    config, steer = state.config, state.config.steer
    prompts = held_out(config.prompts, state.train)
    params = answer_params(config, config.gate.samples)
    groups = [
        [Ask(*asked) for asked in gate.requests(name, prompts, steer.beta, steer.tilt_cap, params)]
        for name in iterations
    ]
    with timed(state.store, stage, f"{len(groups) * len(prompts) * params.n} answers", bool(groups)):
        answers = ask(state, stage, groups, iterations)
        rows = {name: [answers[gate.request_id(name, prompt)] for prompt in prompts] for name in iterations}
        scores = score(state, stage, {name: pairs_of(prompts, texts_of(of_one)) for name, of_one in rows.items()})
    return {
        name: gate.soft_values(of_one, scores[name], scale_of(state, name), steer.beta) for name, of_one in rows.items()
    }


def evaluate(state: RunState) -> Sweep:
    """Answer unseen prompts under every weight of the grid, with the current value models."""
    config, folder, stage = state.config, layout.SWEEP_FOLDER, "evaluate"
    newest = {name: current(state, name, config.iterations) for name in config.objectives}
    inputs = {"values": newest, "evaluate": config.evaluate.model_dump(mode="json")}
    if state.store.metadata(folder) == inputs:
        say(stage, "finished before, skipped")
        return sweeping.sweep_from_json(state.store.read_json(layout.SWEEP_FILE))

    base_scores = score_base(state)
    points = sweeping.grid(list(config.objectives), config.evaluate.grid)
    params = answer_params(config, config.evaluate.samples)
    steer = config.steer
    groups = [
        [Ask(*asked) for asked in sweeping.requests(point, state.evaluation, steer.beta, steer.tilt_cap, params)]
        for point in points
    ]
    with timed(state.store, stage, f"{len(points) * len(state.evaluation) * params.n} answers"):
        answers_by_id = ask(state, stage, groups, newest)
        answers = {
            point.name: [answers_by_id[sweeping.request_id(point, prompt)] for prompt in state.evaluation]
            for point in points
        }
        pairs = [pair for rows in answers.values() for pair in pairs_of(state.evaluation, texts_of(rows))]
        by_objective = score(state, stage, dict.fromkeys(config.objectives, pairs))
    num = len(state.evaluation) * params.n
    scores = {
        point.name: {name: found[start : start + num] for name, found in by_objective.items()}
        for start, point in zip(range(0, len(pairs), num), points, strict=True)
    }
    scales = {name: scale_of(state, name) for name in config.objectives}
    result = sweeping.summarise(points, answers, scores, scales, state.evaluation, config.steer.beta, base_scores)
    state.store.write_json(layout.SWEEP_FILE, result.to_json())
    state.store.finish(folder, inputs)
    return result


def score_base(state: RunState) -> dict[str, list[list[float]]]:
    """Rewards of many answers of the base model to each unseen prompt, by objective: they tell the limit of steering.

    Value models have no part in them: they stay when these change, and when objectives are added.
    """
    config, stage, prompts = state.config, "limit", state.evaluation
    num = config.evaluate.limit_answers
    detail = f"{len(prompts) * num} answers"
    if not num:
        return {}

    def answer() -> list[list[str]]:
        params = answer_params(config, num)
        groups = [[Ask(*asked) for asked in group] for group in base_answers.requests(prompts, params)]
        with timed(state.store, stage, detail):
            answers = ask(state, stage, groups, {})
        return texts_of([answers[base_answers.request_id(prompt)] for prompt in prompts])

    def rewards(name: str) -> list[list[float]]:
        with timed(state.store, stage, detail):
            scores = score(state, stage, {name: pairs_of(prompts, texts)})[name]
        return [scores[start : start + num] for start in range(0, len(scores), num)]

    texts = base_answers.cached(state.store, layout.LIMIT_FOLDER, num, answer)
    folders = {name: layout.limit_reward_folder(name) for name in config.objectives}
    return {
        name: base_answers.cached(state.store, folder, num, partial(rewards, name)) for name, folder in folders.items()
    }


def publish(state: RunState) -> None:
    """Publish the current value models, which the service loads."""
    for name in state.config.objectives:
        values.publish(state.store, name, current(state, name, state.config.iterations))
