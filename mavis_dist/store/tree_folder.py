"""The stored trees of one policy. A shard is written when its last tree arrives; trees may arrive in any order."""

from __future__ import annotations

from collections.abc import Sequence

from mavis_dist.core.tree import Tree
from mavis_dist.store.files import DamagedFile, Store
from mavis_dist.store.shards import read_trees, write_trees


class TreeFolder:
    """Shard n holds the trees of the n-th slice of the prompts: files do not depend on the order of arrival."""

    def __init__(self, store: Store, folder: str, prompt_ids: Sequence[str], shard_size: int):
        """Keeps the shards of an earlier attempt; unreadable files count as missing."""
        self._store, self._folder, self._num_trees = store, folder, len(prompt_ids)
        shards = {
            f"{folder}/part-{start // shard_size:05d}.parquet": list(prompt_ids[start : start + shard_size])
            for start in range(0, len(prompt_ids), shard_size)
        }
        self._missing = {path: ids for path, ids in shards.items() if self._ids(path) != ids}
        self._waiting: dict[str, Tree] = {}  # trees of shards that are not complete

    @property
    def missing(self) -> list[list[str]]:
        """The prompts of every missing shard, in order."""
        return list(self._missing.values())

    def add(self, tree: Tree) -> None:
        """Add a finished tree; adding it again has no effect."""
        for path, ids in list(self._missing.items()):
            if tree.prompt_id in ids:
                self._waiting[tree.prompt_id] = tree
                if all(id_ in self._waiting for id_ in ids):
                    write_trees(self._store, path, [self._waiting.pop(id_) for id_ in ids])
                    del self._missing[path]

    def finish(self) -> None:
        """Write the marker; all trees must have been added."""
        assert not self._missing, self.missing
        self._store.finish(self._folder, {"trees": self._num_trees})

    def _ids(self, path: str) -> list[str]:
        try:
            return [tree.prompt_id for tree in read_trees(self._store, path)] if self._store.exists(path) else []
        except DamagedFile:
            return []  # damaged: its trees are generated again
