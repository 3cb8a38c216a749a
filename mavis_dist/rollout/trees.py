"""Grow the trees of many prompts at the same time on one engine. No Ray.

A tree depends only on (run seed, policy, prompt id), not on other trees or on how many rows run at a time.
Source: arXiv 2508.13415, tree-structured data collection with dynamic splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mavis_dist.core import noise
from mavis_dist.core.tree import ROOT, Finish, Shape, Tree, TreeBuilder, cut_point, segment_length
from mavis_dist.decode import Engine, FinishReason, Request, SamplingParams, Scorer
from mavis_dist.decode.request import Choice, Update
from mavis_dist.types import Policy, Prompt

Path = tuple[int, ...]  # child numbers from the prompt down


class RolloutError(RuntimeError):
    """An answer that could not be generated."""


@dataclass(frozen=True)
class Sampling:
    """The distribution of the trees: the truncated base policy and, for later iterations, its tilt."""

    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    beta: float = 0.0
    tilt_cap: float | None = None


@dataclass
class _Segment:
    tokens: list[int]
    logratios: list[float]
    finish: Finish
    cut: int  # tokens of the parent's segment that precede it


@dataclass
class _Growing:
    """One unfinished tree."""

    prompt: Prompt
    prompt_tokens: tuple[int, ...]
    seed: int
    segments: dict[Path, _Segment] = field(default_factory=dict)
    num_open: int = 0

    def answer(self, path: Path, cut: int) -> tuple[int, ...]:
        """All answer tokens down to the first `cut` tokens of a segment; none for the prompt, which is path ()."""
        tokens: list[int] = []
        while path:
            segment = self.segments[path]
            tokens[:0] = segment.tokens[:cut]
            path, cut = path[:-1], segment.cut
        return tuple(tokens)

    def build(self, policy: Policy) -> Tree:
        builder = TreeBuilder(self.prompt.id, policy.name, self.seed, list(self.prompt_tokens))
        number: dict[Path, int] = {}
        for path in sorted(self.segments):  # parents first, whatever order they finished in
            segment = self.segments[path]
            parent = number[path[:-1]] if len(path) > 1 else ROOT
            number[path] = builder.add(parent, segment.cut, segment.tokens, segment.logratios, segment.finish)
        return builder.build()


class TreeGrower:
    """Turns finished segments into the requests of their children until every tree is complete."""

    def __init__(self, engine: Engine, shape: Shape, policy: Policy, sampling: Sampling, seed: int):
        self._engine, self._shape, self._policy, self._sampling, self._seed = engine, shape, policy, sampling, seed
        self._weights = {policy.objective: 1.0} if policy.objective else {}
        self._origin: dict[str, tuple[_Growing, Path, int]] = {}  # request id -> tree, path, cut in the parent
        self.num_tokens = 0  # generated so far

    def grow(self, prompts: Sequence[Prompt], prompt_tokens: Sequence[Sequence[int]]) -> Iterator[Tree]:
        """The trees of all prompts, in the order in which they are complete; needs an idle engine."""
        assert self._engine.is_idle
        for prompt, tokens in zip(prompts, prompt_tokens, strict=True):
            self.plant(prompt, tokens)
        while not self._engine.is_idle:
            for update in self._engine.step():
                if (tree := self.absorb(update)) is not None:
                    yield tree

    def plant(self, prompt: Prompt, prompt_tokens: Sequence[int]) -> None:
        """Submit the first segments of another tree; the caller steps the engine and passes its updates to `absorb`."""
        seed = noise.stream(self._seed, self._policy.name, prompt.id)
        self._branch(_Growing(prompt, tuple(prompt_tokens), seed), (), 0, self._shape.root)

    def absorb(self, update: Update) -> Tree | None:
        """Process an update of the engine; returns the tree if it completes one. Ignores updates of other requests."""
        if update.request_id not in self._origin:
            return None
        self.num_tokens += len(update.tokens)
        if update.finished is None:
            return None
        tree = self._extend(update.request_id, update.finished)
        return tree.build(self._policy) if tree.num_open == 0 else None

    def _branch(self, tree: _Growing, path: Path, cut: int, count: int) -> None:
        """Start `count` segments after the first `cut` tokens of the segment at `path`."""
        answer, layer = tree.answer(path, cut), len(path)
        uniform = noise.uniform(noise.stream(tree.seed, "length", *path), len(answer))
        length = segment_length(self._shape, layer, self._shape.max_tokens - len(answer), uniform)
        for child in range(count):
            child_path = (*path, child)
            request_id = f"{self._policy.name}/{tree.prompt.id}/{'.'.join(map(str, child_path))}"
            self._origin[request_id] = (tree, child_path, cut)
            tree.num_open += 1
            request = Request(
                id=request_id,
                prompt=tree.prompt_tokens,
                answer=answer,
                weights=self._weights,
                beta=self._sampling.beta,
                tilt_cap=self._sampling.tilt_cap,
                scorer=Scorer.FULL,  # targets need exact log-ratios
                params=SamplingParams(
                    max_tokens=len(answer) + length,
                    top_k=self._sampling.top_k,
                    top_p=self._sampling.top_p,
                    min_p=self._sampling.min_p,
                ),
                stream=noise.stream(tree.seed, *child_path),
            )
            self._engine.submit(request, first=layer > 0)  # started trees before new ones: fewer rows wait

    def _extend(self, request_id: str, choice: Choice) -> _Growing:
        """Append a finished segment to its tree, and start its children if the answer continues."""
        tree, path, cut = self._origin.pop(request_id)
        tree.num_open -= 1
        if choice.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            raise RolloutError(f"prompt {tree.prompt.id!r}: {choice.error or choice.finish}")
        segment = _Segment(choice.tokens, choice.logratios, Finish.OPEN, cut)
        tree.segments[path] = segment
        length = len(choice.tokens)
        if choice.finish is FinishReason.STOP:
            segment.finish = Finish.STOP
            if len(path) == 1 and self._shape.dynamic_split and self._shape.layers > 1 and length > 1:
                uniform = noise.uniform(noise.stream(tree.seed, "cut", *path), 0)
                self._branch(tree, path, cut_point(length, uniform), self._shape.children)
        elif len(tree.answer(path, length)) == self._shape.max_tokens:
            segment.finish = Finish.LENGTH
        else:
            self._branch(tree, path, length, self._shape.children)
        return tree
