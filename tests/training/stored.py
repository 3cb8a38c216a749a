"""What the stages before training leave behind."""

from __future__ import annotations

from mavis_dist.core.tree import Shape, Tree
from mavis_dist.decode import Engine
from mavis_dist.models.load import BaseModel
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store.files import Store
from mavis_dist.store.layout import rollout_folder
from mavis_dist.store.shards import write_trees
from mavis_dist.types import Policy, Prompt


def store_trees(store: Store, base: BaseModel, count: int) -> list[Tree]:
    """So many trees of the base policy, of prompts p0, p1, ..., sorted by prompt."""
    grower = TreeGrower(Engine(base), Shape(2, 2, 2, 12), Policy(), Sampling(), 0)
    prompts = [Prompt(f"p{i}", "") for i in range(count)]
    trees = sorted(grower.grow(prompts, [[5 + i, 6, 7] for i in range(count)]), key=lambda tree: tree.prompt_id)
    write_trees(store, f"{rollout_folder(Policy())}/part-00000.parquet", trees)
    store.finish(rollout_folder(Policy()), {})
    return trees
