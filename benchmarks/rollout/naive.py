"""Reference for growing trees: Hugging Face `generate` for every node, on the prompt and path so far.

The growth rule is the project's (arXiv 2508.13415); no cache is kept between calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.trees import Question
from mavis_dist.core.tree import ROOT, Finish, Shape, Tree, TreeBuilder, cut_point, segment_length
from mavis_dist.models.load import BaseModel
from mavis_dist.types import BASE_POLICY


@dataclass(frozen=True)
class State:
    """A state that children start at: after the first `cut` tokens of a node."""

    parent: int
    cut: int
    answer: tuple[int, ...]  # the tokens before it, without the prompt
    layer: int  # 0 at the prompt


class PlainGrower:
    """Grows one tree at a time from the base model with top-k sampling."""

    def __init__(self, base: BaseModel, shape: Shape, top_k: int, seed: int, per_child: bool = False):
        """`per_child`: one call per child instead of one call for all children of a node."""
        self._base, self._shape, self._top_k, self._per_child = base, shape, top_k, per_child
        self._random = random.Random(seed)
        torch.manual_seed(seed)

    def grow(self, question: Question) -> Tree:
        builder = TreeBuilder(question.prompt.id, BASE_POLICY, 0, list(question.tokens))
        open_states = [State(ROOT, 0, (), 0)]
        while open_states:
            state = open_states.pop(0)
            for tokens in self._children(question.tokens, state):
                open_states += self._absorb(builder, state, tokens)
        return builder.build()

    def _children(self, prompt: tuple[int, ...], state: State) -> Iterator[list[int]]:
        """The tokens of every segment that starts at a state."""
        shape, num_tokens = self._shape, len(state.answer)
        count = shape.root if state.layer == 0 else shape.children
        length = segment_length(shape, state.layer, shape.max_tokens - num_tokens, self._random.random())
        for num_rows in [1] * count if self._per_child else [count]:
            yield from self._generate(prompt + state.answer, length, num_rows, min_tokens=int(num_tokens == 0))

    def _absorb(self, builder: TreeBuilder, state: State, tokens: list[int]) -> list[State]:
        """Add a finished segment; returns the states that its children start at."""
        shape, answer = self._shape, (*state.answer, *tokens)
        is_stop, is_longest = tokens[-1] in self._base.eos_ids, len(answer) == shape.max_tokens
        finish = Finish.STOP if is_stop else Finish.LENGTH if is_longest else Finish.OPEN
        node = builder.add(state.parent, state.cut, tokens, [0.0] * len(tokens), finish)
        if finish is Finish.OPEN:
            return [State(node, len(tokens), answer, state.layer + 1)]
        if is_stop and state.layer == 0 and shape.dynamic_split and shape.layers > 1 and len(tokens) > 1:
            cut = cut_point(len(tokens), self._random.random())
            return [State(node, cut, answer[:cut], 1)]
        return []

    def _generate(self, prefix: tuple[int, ...], length: int, num_rows: int, min_tokens: int) -> list[list[int]]:
        model: Any = self._base.model
        ids = torch.tensor([prefix])
        rows = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=self._top_k,
            top_p=1.0,
            num_return_sequences=num_rows,
            min_new_tokens=min_tokens,
            max_new_tokens=length,
            eos_token_id=list(self._base.eos_ids),
            pad_token_id=self._base.eos_ids[0],
        )
        return [self._up_to_end(row) for row in rows[:, len(prefix) :].tolist()]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        """The tokens of a row without its padding."""
        ends = [i for i, token in enumerate(tokens) if token in self._base.eos_ids]
        return tokens[: ends[0] + 1] if ends else tokens
