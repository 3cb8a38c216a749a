"""How much there is to do in every stage of a run: trees, tokens, answers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb

from mavis_dist.config import Config
from mavis_dist.sections import TextRule, TreeShape

BATCH_SIZE, LIMIT_BATCH = 32, 256  # requests that an actor gets at a time; answers, where they tell the limit
SCORED_TOGETHER = 64  # answers of limit, gate and evaluation
PREFIX_TOKENS = 8  # between the unfinished answers that are scored


@dataclass(frozen=True)
class Lengths:
    """What a config does not say, in tokens."""

    prompt: int = 100  # with its template
    answer: float | None = None  # mean; None: `rollout.max_tokens`, as if none ended early


@dataclass(frozen=True)
class Decoding:
    """Answers of rollout actors."""

    stage: str
    items: tuple[float, ...]  # tokens to generate of what an actor takes at a time
    rows: float  # of an item, at the end of its answers
    is_guided: bool
    candidates: float  # per token that value models evaluate, if it is guided


@dataclass(frozen=True)
class Labels:
    """Sets of answers that tasks of one core score."""

    stage: str
    answers: tuple[float, ...]  # of each set
    objectives: tuple[str, ...]  # of each set
    num_shards: int  # of each set: its tasks take whole ones
    are_actors_idle: bool = False  # they keep their models meanwhile


@dataclass(frozen=True)
class Training:
    """Fits of value models."""

    stage: str
    num_fits: int
    steps: int  # of each
    tokens: float  # of a step, over all workers


Stage = Decoding | Labels | Training
LAZY_CANDIDATES = 16.4  # per token on random models of two sizes (docs/figures/device.json)


def num_nodes(shape: TreeShape) -> int:
    """Segments of a tree in which every segment has its children."""
    return sum(shape.root * shape.children**layer for layer in range(shape.layers))


def num_leaves(shape: TreeShape) -> int:
    return int(shape.root * shape.children ** (shape.layers - 1))


def tree_tokens(shape: TreeShape, max_tokens: int, lengths: Lengths) -> float:
    """Expected tokens of a tree's answers: a segment is a `layers`-th of an answer on average. More than there are
    where answers end early, unless `lengths.answer` says how long they are.
    """
    return num_nodes(shape) * (lengths.answer or max_tokens) / shape.layers


def stages(config: Config, lengths: Lengths) -> list[Stage]:
    """All stages of a run in their order, without those that take next to nothing."""
    found: list[Stage] = []
    for iteration in range(config.iterations):
        found += [_rollouts(config, lengths, iteration), _labels(config, lengths, iteration)]
        found.append(_training(config, lengths, iteration))
        if iteration > 0:
            found += _scored(config, _gate(config, lengths, iteration), lengths, each=1)
    num, asked = config.evaluate.limit_answers, config.prompts.evaluation
    if num:
        limit = _answers(config, lengths, "limit", asked, num, batch=max(1, LIMIT_BATCH // num), is_guided=False)
        found += _scored(config, limit, lengths, len(config.objectives))
    points = num_points(len(config.objectives), config.evaluate.grid)
    sweep = _answers(config, lengths, "evaluate", asked, config.evaluate.samples, groups=points)
    return [*found, *_scored(config, sweep, lengths, len(config.objectives))]


def num_points(num_objectives: int, grid: int) -> int:
    """Of the sweep: the base model, every objective alone, and the inner points between every pair."""
    return 1 + num_objectives + comb(num_objectives, 2) * (grid - 2)


def _num_policies(config: Config, iteration: int) -> int:
    return 1 if iteration == 0 else len(config.objectives)


def _shape(config: Config, iteration: int) -> TreeShape:
    return config.rollout.first if iteration == 0 else config.rollout.later


def _rollouts(config: Config, lengths: Lengths, iteration: int) -> Decoding:
    shape, shard = _shape(config, iteration), config.rollout.prompts_per_shard
    tokens = tree_tokens(shape, config.rollout.max_tokens, lengths)
    shards = _chunks(config.prompts.train, shard)
    items = tuple(tokens * trees for _ in range(_num_policies(config, iteration)) for trees in shards)
    rows = num_leaves(shape) * min(shard, config.prompts.train)
    return Decoding(f"rollouts i{iteration}", items, rows, iteration > 0, config.rollout.top_k)


def _labels(config: Config, lengths: Lengths, iteration: int) -> Labels:
    shape, names = _shape(config, iteration), tuple(config.objectives)
    per_tree = float(num_leaves(shape))
    if config.learns_prefixes:
        per_tree += tree_tokens(shape, config.rollout.max_tokens, lengths) / PREFIX_TOKENS
    shards = len(_chunks(config.prompts.train, config.rollout.prompts_per_shard))
    return Labels(f"labels i{iteration}", (config.prompts.train * per_tree,) * len(names), names, shards)


def _training(config: Config, lengths: Lengths, iteration: int) -> Training:
    shape, train = _shape(config, iteration), config.train
    num_trees = config.prompts.train - config.prompts.validation
    is_joint = config.value.is_joint and iteration == 0
    epochs = 1 if config.value.kind == "states" else train.epochs
    tokens = train.trees_per_step * (lengths.prompt + tree_tokens(shape, config.rollout.max_tokens, lengths))
    return Training(
        f"train i{iteration}",
        1 if is_joint else len(config.objectives),
        epochs * ceil(num_trees / train.trees_per_step),
        tokens,
    )


def _gate(config: Config, lengths: Lengths, iteration: int) -> Decoding:
    # In iteration 1 the policies before are measured as well.
    groups = len(config.objectives) * (2 if iteration == 1 else 1)
    prompts = max(1, config.prompts.validation)
    return _answers(config, lengths, f"gate i{iteration}", prompts, config.gate.samples, groups=groups)


def _answers(
    config: Config,
    lengths: Lengths,
    stage: str,
    prompts: int,
    samples: int,
    groups: int = 1,
    batch: int = BATCH_SIZE,
    is_guided: bool = True,
) -> Decoding:
    """So many answers to each prompt, for every group; an actor takes `batch` prompts of a group at a time."""
    counts = [samples * asked for asked in _chunks(prompts, batch)]
    items = tuple((lengths.answer or config.rollout.max_tokens) * n for _ in range(groups) for n in counts)
    return Decoding(stage, items, max(counts), is_guided, LAZY_CANDIDATES)


def _scored(config: Config, stage: Decoding, lengths: Lengths, each: int) -> list[Stage]:
    """A stage and the scores of its answers, each by so many objectives; those of text rules take next to nothing."""
    names = tuple(name for name, spec in config.objectives.items() if not isinstance(spec, TextRule))
    if not names:
        return [stage]
    answers = sum(stage.items) / (lengths.answer or config.rollout.max_tokens) * each / len(config.objectives)
    shards = ceil(answers / SCORED_TOGETHER)
    return [stage, Labels(f"labels {stage.stage}", (answers,) * len(names), names, shards, are_actors_idle=True)]


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
