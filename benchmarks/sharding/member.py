"""One process of a group without Ray: what it holds, and what the leader's engine answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

import psutil
import torch
import transformers

from mavis_dist.config import Config
from mavis_dist.core.tree import Tree
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.models.load import BaseModel, load_base, load_skeleton
from mavis_dist.models.lockstep import Leader, Place, Shard, meeting_point
from mavis_dist.prompts import load_prompts
from mavis_dist.rollout.trees import TreeGrower
from mavis_dist.rollout.worker import make_grower
from mavis_dist.types import Policy, Prompt

HOST = "127.0.0.1"
SAMPLED_S = 0.01  # between two looks at the memory
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of one process, in MiB."""

    weights: float  # of its shard
    most: float  # that loading took at any time; pages of the weight files, which processes share, left out


@dataclass(frozen=True)
class Count:
    """Of prompts that are answered with the most likely tokens, and of trees."""

    greedy: int
    trees: int


@dataclass(frozen=True, eq=False)
class Answered:
    """What the leader's engine has answered."""

    greedy: list[list[int]]
    trees: list[list[int]]
    tokens_per_s: float  # of the greedy answers


def run(rank: int, size: int, ports: Queue[int], results: Queue[Any], config: Config, count: Count) -> None:
    """Puts the process's `Memory`, and in rank 0, where answers are asked for, then what it has `Answered`."""
    torch.set_num_threads(1)
    shard = _join(rank, size, ports) if size > 1 else None
    load_skeleton(config.base.model)  # code and tokenizer, which do not count
    with _most_memory() as most:
        base = load_base(config.base.model, config.base.dtype, num_shards=size)
    results.put(Memory(sum(map(_local_bytes, base.model.parameters())) / MIB, most[0] / MIB))
    if count.greedy == 0:
        return
    if shard is not None and rank > 0:
        shard.hold(base.model)
        with suppress(RuntimeError):  # the leader has ended
            shard.follow()
        return
    if shard is not None:
        Leader(shard, base.model, print)
    _, prompts = load_prompts(config.prompts, config.seed)
    greedy, seconds = answer(base, config, prompts[: count.greedy])
    trees = grow(base, config, prompts[: count.trees])
    results.put(Answered(greedy, [tree.tokens.tolist() for tree in trees], sum(map(len, greedy)) / seconds))


def answer(base: BaseModel, config: Config, prompts: Sequence[Prompt]) -> tuple[list[list[int]], float]:
    """The most likely tokens of an answer to each prompt, and the seconds that all of them took."""
    engine = Engine(base, None, config.rollout.rows)
    params = SamplingParams(config.rollout.max_tokens, temperature=0.0)
    requests = [Request(one.id, base.chat(one.messages, config.base.system), params=params) for one in prompts]
    began = time.perf_counter()
    choices = engine.generate(requests)
    return [choice.tokens for [choice] in choices], time.perf_counter() - began


def grow(base: BaseModel, config: Config, prompts: Sequence[Prompt]) -> list[Tree]:
    """A tree of the base policy for each prompt, in their order."""
    engine = Engine(base, None, config.rollout.rows)
    grower: TreeGrower = make_grower(config, engine, Policy())
    for prompt in prompts:
        grower.plant(prompt, base.chat(prompt.messages, config.base.system))
    trees = {}
    while not engine.is_idle:
        for update in engine.step():
            if (tree := grower.absorb(update)) is not None:
                trees[tree.prompt_id] = tree
    return [trees[prompt.id] for prompt in prompts]


def _join(rank: int, size: int, ports: Queue[int]) -> Shard:
    if rank > 0:
        return Shard(Place(rank, size, HOST, ports.get()), "cpu")
    store = meeting_point(HOST, size)
    for _ in range(1, size):
        ports.put(store.port)
    return Shard(Place(0, size, HOST, store.port), "cpu", store)


@contextmanager
def _most_memory() -> Iterator[list[int]]:
    """How many bytes this process takes beyond those of now, at most, until the end of the block."""
    from torch.distributed import tensor  # noqa: F401  code that is loaded only once is not the model's

    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # noqa: B018
    process, most, is_done = psutil.Process(), [0], threading.Event()
    before = _own(process)

    def watch() -> None:
        while not is_done.wait(SAMPLED_S):
            most[0] = max(most[0], _own(process) - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        is_done.set()
        thread.join()


def _own(process: psutil.Process) -> int:
    """Bytes in memory, without pages of files."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def _local_bytes(parameter: Any) -> int:
    """Bytes of the part of a parameter that this process holds."""
    part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(part.nbytes)
