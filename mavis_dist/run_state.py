"""What the stages of a run share: its state, the rollout actors, answers and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import yaml

from mavis_dist import cluster, environment
from mavis_dist import config as config_module
from mavis_dist.actors import Progress, WorkerPool, start_progress_actor
from mavis_dist.config import Config
from mavis_dist.core.siblings import MIN_TREES
from mavis_dist.decode import SamplingParams
from mavis_dist.decode.load_guide import read_card
from mavis_dist.evaluate import gate
from mavis_dist.models.load import fingerprints
from mavis_dist.plan import Plan, make_plan, tasks_of
from mavis_dist.preflight.checks import check
from mavis_dist.preflight.machine import MACHINE_CHECK_S, check_machine, check_rewards, local_fingerprints
from mavis_dist.progress import metered, say
from mavis_dist.prompts import held_out
from mavis_dist.rewards import score_parts
from mavis_dist.rollout.labels import reward_scale
from mavis_dist.rollout.worker import Answer, Answered, Ask, Batch, Grow, Grown, Result, worker_starter
from mavis_dist.sections import TextRule
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.layout import label_folder
from mavis_dist.store.shards import shard_names
from mavis_dist.tasks import map_tasks, on_every_machine
from mavis_dist.types import Policy, Prompt, RewardScale

LAST_LINE = "# end of the config"
Pool = WorkerPool[Mapping[str, int], Batch, Result]

Pair = tuple[str, str]  # the texts of a prompt and an answer

BATCH_SIZE = 32  # requests that an actor answers at the same time
SCORED_TOGETHER = 64  # answers; parts that depended on the machines would have other scores, by rounding


@dataclass
class RunState:
    """An open run."""

    config: Config
    store: Store
    plan: Plan
    progress: Progress
    train: list[Prompt]
    evaluation: list[Prompt]
    _pool: Pool | None = None

    def worker_pool(self) -> Pool:
        """The rollout actors, started on first use."""
        if self._pool is None:
            workers = worker_starter(self.config)
            self._pool = WorkerPool(workers.start, self.config.rollout.actors, workers.stop)
        return self._pool

    def release_workers(self) -> None:
        """Kill the rollout actors to free their cores."""
        if self._pool is not None:
            self._pool.release()
            self._pool = None

    @property
    def validation_ids(self) -> frozenset[str]:
        """Ids of the prompts that validate the value models."""
        return frozenset(prompt.id for prompt in held_out(self.config.prompts, self.train))


def open_run(config: Config) -> RunState:
    """Try all that can fail before anything expensive starts; needs a connected cluster. Raises UserError."""
    store = Store(config.storage, config.run)
    plan = make_plan(config, cluster.nodes())
    check_same_run(store, config)
    store.check_writable()
    findings = check(config)
    check_machines(store, config)
    on_every_machine(check_rewards, config, findings.prompts.sample, stage="check rewards")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    store.write_bytes(layout.CONFIG_FILE, f"{text}{LAST_LINE}\n".encode())
    for note in plan.notes:
        say("plan", note)
    if config.prompts.validation < MIN_TREES:
        text = f"ceiling of R² and sibling test are left out: they need {MIN_TREES} or more"
        say("plan", f"prompts.validation is {config.prompts.validation}: {text}")
    for topic, text in findings.notes:
        say(topic, text)
    prompts = findings.prompts
    return RunState(config, store, plan, start_progress_actor(), prompts.train, prompts.evaluation)


def check_machines(store: Store, config: Config, is_distilling: bool = False) -> None:
    """Raises UserError unless all machines see the same storage and may write to it, and have what the config needs."""
    there = environment.versions(), local_fingerprints(config), is_distilling
    with store.probe() as name:
        on_every_machine(check_machine, config, name, *there, stage="check", limit_s=MACHINE_CHECK_S)


def check_same_run(store: Store, config: Config) -> None:
    """Raises StoreError or ConfigError for a config that would mix its results with those of another."""
    remedy = f"restore {store.root}/run.yaml, or choose another name with run=NAME"
    if not store.exists(layout.CONFIG_FILE):
        if store.exists(layout.ROLLOUTS):
            raise StoreError(f"the run has results but its config run.yaml is missing: {remedy}")
        return
    text = store.read_bytes(layout.CONFIG_FILE).decode(errors="replace")
    if not text.endswith(f"{LAST_LINE}\n"):  # a truncated config may still be valid
        raise StoreError(f"the config of the run is damaged (run.yaml has no last line {LAST_LINE!r}): {remedy}")
    try:
        started = config_module.parse(yaml.safe_load(text))
    except (yaml.YAMLError, config_module.ConfigError) as error:
        raise StoreError(f"the config of the run is damaged ({' '.join(str(error).split())}): {remedy}") from None
    if conflicts := config_module.conflicts(started, config):
        raise config_module.ConfigError(conflicts[0])


def scale_of(state: RunState, objective: str) -> RewardScale:
    """The unit of an objective: its mean and spread over the base model's answers to the training prompts."""
    folder = label_folder(Policy(), objective)
    paths = [f"{folder}/{name}" for name in shard_names(state.store, folder)]
    training = {prompt.id for prompt in state.train} - state.validation_ids
    return reward_scale(state.store, objective, paths, training)


def current(state: RunState, objective: str, before: int) -> int:
    """The newest accepted iteration of an objective's value model among those before `before`, which is at least 1."""
    iteration = gate.current(state.store, objective, before)
    assert iteration is not None  # the first one is always accepted
    return iteration


def answer_params(config: Config, samples: int) -> SamplingParams:
    """Settings of answers under the reference policy of the rollouts."""
    rollout = config.rollout
    return SamplingParams(rollout.max_tokens, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p, n=samples)


def ask(
    state: RunState, stage: str, groups: Sequence[Sequence[Ask]], value_iterations: Mapping[str, int]
) -> dict[str, list[Answer]]:
    """Answers by request id. Those of a group do not depend on the other groups, to the last bit."""
    batches = [group[start : start + BATCH_SIZE] for group in groups for start in range(0, len(group), BATCH_SIZE)]
    results = work(state, stage, batches, value_iterations)
    total = sum(map(len, groups))
    return {result.request_id: result.answers for result in metered(results, stage, "prompts", total)}


@overload
def work(
    state: RunState, stage: str, batches: Sequence[Sequence[Grow]], value_iterations: Mapping[str, int]
) -> Iterator[Grown]: ...


@overload
def work(
    state: RunState, stage: str, batches: Sequence[Sequence[Ask]], value_iterations: Mapping[str, int]
) -> Iterator[Answered]: ...


def work(
    state: RunState, stage: str, batches: Sequence[Batch], value_iterations: Mapping[str, int]
) -> Iterator[Result]:
    """Results of all batches under these value models, which must belong to the base model.

    Starts no actors if there are no batches.

    Raises:
        ValueModelError: for value models of another base, before an actor loads them.
    """
    if not batches:
        return
    base, tokenizer = fingerprints(state.config.base.model)
    for name, iteration in value_iterations.items():
        read_card(state.store, layout.value_folder(name, iteration)).check(base, tokenizer)
    yield from state.worker_pool().run(stage, value_iterations, batches)


def texts_of(answers: Sequence[Sequence[Answer]]) -> list[list[str]]:
    """The texts of the answers to each prompt."""
    return [[text for _, text in row] for row in answers]


def pairs_of(prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> list[Pair]:
    """Every answer with its prompt; `texts` are the answers of each prompt."""
    return [(prompt.text, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]


def score(state: RunState, stage: str, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[float]]:
    """Raw rewards of the pairs of each objective, the same on any number of machines; the rollout actors must be idle.

    Text rules score thousands of answers while a task starts, and stay in the driver.
    """
    parts_of = {
        name: [of_one[start : start + SCORED_TOGETHER] for start in range(0, len(of_one), SCORED_TOGETHER)]
        for name, of_one in pairs.items()
    }
    objectives = state.config.objectives
    slow = [name for name, parts in parts_of.items() if parts and not isinstance(objectives[name], TextRule)]
    shares = [(name, share) for name in slow for share in tasks_of(parts_of[name], len(slow), cluster.nodes())]
    tasks = [(objectives[name], share) for name, share in shares]
    scored = map_tasks(score_parts, tasks, stage, "parts scored", are_actors_idle=True) if tasks else []
    scores = {name: [] if name in slow else score_parts(objectives[name], parts) for name, parts in parts_of.items()}
    for (name, _), of_share in zip(shares, scored, strict=True):
        scores[name] += of_share
    return {name: [one for part in of_one for one in part] for name, of_one in scores.items()}


def finished(state: RunState, folder: str, stage: str) -> bool:
    """Whether a folder is finished; prints a line if so."""
    if state.store.metadata(folder) is None:
        return False
    say(stage, f"{folder} finished before, skipped")
    return True
