"""Answer tokens per second of growing trees on one engine and by the reference; prefix tokens that forks save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common.interleave import Speeds, take_turns
from benchmarks.common.trees import Question, grow, questions_of, repetition_questions, shape_of
from benchmarks.rollout.naive import PlainGrower
from mavis_dist.config import Config
from mavis_dist.core.tree import Shape, Tree
from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.decode.load_guide import load_models
from mavis_dist.models.load import BaseModel
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Policy


@dataclass(frozen=True)
class Variant:
    """One method of growing trees."""

    grow: Callable[[Shape, Sequence[Question]], list[Tree]]
    shape: Shape
    num_prompts: int  # per repetition


def measure(
    config: Config, store: Store, base: BaseModel, num_prompts: int, num_plain_prompts: int, repetitions: int
) -> Speeds:
    """Answer tokens per second of every variant. The reference's speed does not depend on the number of its trees."""
    variants = make_variants(config, store, base, num_prompts, num_plain_prompts)
    questions = questions_of(config, base)
    for variant in variants.values():
        variant.grow(replace(variant.shape, max_tokens=variant.shape.layers), questions[:1])

    def tokens_of(variant: Variant) -> Callable[[int], int]:
        def run(repetition: int) -> int:
            trees = variant.grow(variant.shape, repetition_questions(questions, repetition, variant.num_prompts))
            return sum(len(tree.tokens) for tree in trees)

        return run

    return take_turns({name: tokens_of(variant) for name, variant in variants.items()}, repetitions)


def make_variants(
    config: Config, store: Store, base: BaseModel, num_prompts: int, num_plain_prompts: int
) -> dict[str, Variant]:
    """Base trees on an engine and by the reference, and tilted trees of every objective on an engine with its guide."""
    rollout = config.rollout
    first, later = shape_of(rollout.first, rollout), shape_of(rollout.later, rollout)
    engine = Engine(base, max_rows=rollout.rows)
    variants = {"trees": Variant(_on_engine(engine, config, Policy()), first, num_prompts)}
    for name in config.objectives:
        guided = Engine(base, make_guide(config, store, name, base), max_rows=rollout.rows)
        variants[f"tilted_{name}"] = Variant(_on_engine(guided, config, Policy(name, 1)), later, num_prompts)
    for name, per_child in (("reference", False), ("reference_per_child", True)):
        variants[name] = Variant(_plainly(base, config, per_child), first, num_plain_prompts)
    return variants


def make_guide(config: Config, store: Store, objective: str, base: BaseModel) -> LocalGuide:
    """The value model that tilts an objective's trees in iteration 1."""
    folders = {objective: values.fetch(store, objective, 0)}
    return LocalGuide(load_models(folders, getattr(torch, config.base.dtype), base=base))


def _on_engine(engine: Engine, config: Config, policy: Policy) -> Callable[[Shape, Sequence[Question]], list[Tree]]:
    return lambda shape, questions: grow(engine, config, shape, policy, questions)


def _plainly(base: BaseModel, config: Config, per_child: bool) -> Callable[[Shape, Sequence[Question]], list[Tree]]:
    def run(shape: Shape, questions: Sequence[Question]) -> list[Tree]:
        grower = PlainGrower(base, shape, config.rollout.top_k, config.seed, per_child)
        return [grower.grow(question) for question in questions]

    return run


class EncodingCounter:
    """Proxy of an engine's slots that counts the prefilled tokens."""

    def __init__(self, slots: Any):
        self._slots, self.num_tokens = slots, 0

    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_read: Sequence[int] | None = None
    ) -> torch.Tensor:
        if num_read is not None:
            self.num_tokens += sum(map(len, tokens))
        return self._slots.extend(rows, tokens, num_read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slots, name)

    def __contains__(self, row: int) -> bool:
        return row in self._slots


def prefix_tokens(config: Config, base: BaseModel, shape: Shape, num_prompts: int) -> dict[str, int]:
    """Prefix tokens (prompt and path) of all segments of some trees, and how many of them the engine computes.

    The last token of every prefix is computed in the row's first step, even if a fork copied the others.
    """
    engine: Any = Engine(base, max_rows=config.rollout.rows)
    engine._base = counter = EncodingCounter(engine._base)
    trees = grow(engine, config, shape, Policy(), questions_of(config, base)[:num_prompts])
    num_segments = sum(tree.num_nodes for tree in trees)
    return {"all": sum(map(num_prefix_tokens, trees)), "computed": counter.num_tokens + num_segments}


def num_prefix_tokens(tree: Tree) -> int:
    """Prefix tokens that one sequence per segment computes."""
    answers = sum(len(tree.answer(node)) - tree.length(node) for node in range(tree.num_nodes))
    return tree.num_nodes * len(tree.prompt_tokens) + answers
