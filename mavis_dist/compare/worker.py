"""The actor that computes cells: one engine, and the cells of a method and seed one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from mavis_dist.actors import Turn
from mavis_dist.compare.cells import Cell, compute
from mavis_dist.compare.method import make_methods
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.groups import Alike, LeaderStarter, rollout_group
from mavis_dist.prompts import load_prompts


@dataclass(frozen=True)
class Finished:
    """A cell whose file is written."""

    key: str
    num_tokens: int = 0


@ray.remote
class CellWorker:
    """Computes the cells of a config."""

    def __init__(self, config: Config, driver: Alike):
        self._workspace = Workspace(config, lambda: rollout_group(config, driver).base)
        self._methods = make_methods(config.compare, self._workspace)
        _, self._prompts = load_prompts(config.prompts, config.seed)
        self._left: dict[int, deque[Cell]] = {}

    def work(self, settings: None, item: tuple[int, Sequence[Cell]] | None) -> Turn[Finished]:
        """Compute one cell of a numbered list, which need not be finished."""
        if item is not None:
            self._left[item[0]] = deque(item[1])
        number, cells = next(iter(self._left.items()))
        cell = cells.popleft()
        if not self._workspace.store.exists(cell.path):  # an actor that died may have finished it
            compute(cell, self._methods[cell.method], self._prompts, self._workspace)
        if not cells:
            del self._left[number]
        return Turn([Finished(cell.name)], frozenset(self._left), has_room=False)


def worker_starter(config: Config) -> LeaderStarter:
    """Starts actors with `rollout.cpus_per_actor` and `rollout.gpus_per_actor`."""
    return LeaderStarter(CellWorker, config)
