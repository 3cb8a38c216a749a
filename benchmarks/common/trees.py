"""Grows trees as the rollout workers do, on an engine in the benchmark's own process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mavis_dist.config import Config
from mavis_dist.core.tree import Shape, Tree
from mavis_dist.decode import Engine
from mavis_dist.models.load import BaseModel
from mavis_dist.prompts import load_prompts
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.sections import Rollout, TreeShape
from mavis_dist.types import Policy, Prompt


@dataclass(frozen=True)
class Question:
    """A training prompt with its tokens, chat template applied."""

    prompt: Prompt
    tokens: tuple[int, ...]


def questions_of(config: Config, base: BaseModel) -> list[Question]:
    """The training prompts of a run."""
    prompts, _ = load_prompts(config.prompts, config.seed)
    return [Question(prompt, base.chat(prompt.messages, config.base.system)) for prompt in prompts]


def repetition_questions(questions: Sequence[Question], repetition: int, count: int) -> list[Question]:
    """The questions of one repetition; the first follows the last."""
    return [questions[(repetition * count + i) % len(questions)] for i in range(count)]


def shape_of(branching: TreeShape, rollout: Rollout) -> Shape:
    return Shape(branching.root, branching.children, branching.layers, rollout.max_tokens, rollout.dynamic_split)


def grow(engine: Engine, config: Config, shape: Shape, policy: Policy, questions: Sequence[Question]) -> list[Tree]:
    """One tree per question, with the sampling settings of a run."""
    rollout, steer = config.rollout, config.steer
    sampling = Sampling(rollout.top_k, rollout.top_p, rollout.min_p, steer.beta, steer.tilt_cap)
    grower = TreeGrower(engine, shape, policy, sampling, config.seed)
    return list(grower.grow([q.prompt for q in questions], [q.tokens for q in questions]))
