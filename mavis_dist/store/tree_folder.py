"""The stored trees of one policy: shards that are written as their last tree arrives, in whatever order trees come."""

from __future__ import annotations

from collections.abc import Sequence

from mavis_dist.core.tree import Tree
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.shards import read_trees, write_trees


class TreeFolder:
    """Shard n holds the trees of the n-th slice of the prompts: no file depends on who grew what, and when."""

    def __init__(self, store: Store, folder: str, prompt_ids: Sequence[str], shard_size: int):
        """Takes over what an earlier attempt left; files that cannot be read count as not there."""
        self._store, self._folder, self._num_trees = store, folder, len(prompt_ids)
        shards = {
            f"{folder}/part-{start // shard_size:05d}.parquet": list(prompt_ids[start : start + shard_size])
            for start in range(0, len(prompt_ids), shard_size)
        }
        self._missing = {path: ids for path, ids in shards.items() if self._ids(path) != ids}
        self._waiting: dict[str, Tree] = {}  # trees of shards that are not complete

    @property
    def missing(self) -> list[list[str]]:
        """The prompts of every shard that is not there, in order."""
        return list(self._missing.values())

    def add(self, tree: Tree) -> None:
        """Take a finished tree; one that is there already is the same tree."""
        for path, ids in list(self._missing.items()):
            if tree.prompt_id in ids:
                self._waiting[tree.prompt_id] = tree
                if all(id_ in self._waiting for id_ in ids):
                    write_trees(self._store, path, [self._waiting.pop(id_) for id_ in ids])
                    del self._missing[path]

    def finish(self) -> None:
        """All trees are there: the folder is complete."""
        assert not self._missing, self.missing
        self._store.finish(self._folder, {"trees": self._num_trees})

    def _ids(self, path: str) -> list[str]:
        try:
            return [tree.prompt_id for tree in read_trees(self._store, path)] if self._store.exists(path) else []
        except StoreError:
            return []  # torn: its trees are grown again
