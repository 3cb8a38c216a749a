"""Trees of one rollout actor, of which a process may die meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mavis_dist.actors import WorkerPool
from mavis_dist.config import Config
from mavis_dist.core.tree import Tree
from mavis_dist.rollout.worker import Grow, worker_starter
from mavis_dist.types import Policy


def grow(
    config: Config, batches: Sequence[list[Grow]], strike: Callable[[], None] | None = None
) -> dict[tuple[Policy, str], Tree]:
    """Trees by policy and prompt, steered by the models of iteration 0 where the policy is; `strike` is called once,
    after the first of them.
    """
    workers, trees = worker_starter(config), dict[tuple[Policy, str], Tree]()
    pool = WorkerPool(workers.start, 1, workers.stop)
    try:
        for grown in pool.run("grow", {"brief": 0}, batches):
            trees[grown.policy, grown.tree.prompt_id] = grown.tree
            if strike is not None:
                strike()
                strike = None
    finally:
        pool.release()
    return trees
