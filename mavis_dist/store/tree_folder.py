"""The stored trees of one policy: shards that are written as their last tree arrives, in whatever order trees come."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mavis_dist.core.tree import Tree
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.shards import read_trees, write_trees

LOOSE_FILE = "loose.parquet"  # finished trees whose shards are not complete
LOOSE_EVERY_S = 30.0


class TreeFolder:
    """Shard n holds the trees of the n-th slice of the prompts: no file depends on who grew what, and when."""

    def __init__(self, store: Store, folder: str, prompt_ids: Sequence[str], shard_size: int):
        """Takes over what an earlier attempt left; files that cannot be read count as not there."""
        self._store, self._folder = store, folder
        self._shards = {
            f"{folder}/part-{start // shard_size:05d}.parquet": list(prompt_ids[start : start + shard_size])
            for start in range(0, len(prompt_ids), shard_size)
        }
        self._open = {path: ids for path, ids in self._shards.items() if self._ids(path) != ids}
        self._loose: dict[str, Tree] = {}
        self._saved_at = time.monotonic()
        unwritten = {id_ for ids in self._open.values() for id_ in ids}
        for tree in self._read(f"{folder}/{LOOSE_FILE}"):
            if tree.prompt_id in unwritten:
                self.add(tree)

    @property
    def missing(self) -> list[str]:
        """Prompts whose trees are not there, in order."""
        return [id_ for ids in self._open.values() for id_ in ids if id_ not in self._loose]

    def add(self, tree: Tree) -> None:
        """Take a finished tree; those of incomplete shards are saved every now and then."""
        self._loose[tree.prompt_id] = tree
        for path, ids in list(self._open.items()):
            if all(id_ in self._loose for id_ in ids):
                write_trees(self._store, path, [self._loose.pop(id_) for id_ in ids])
                del self._open[path]
        if time.monotonic() - self._saved_at > LOOSE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write down the trees of incomplete shards."""
        self._saved_at = time.monotonic()
        if self._loose:
            write_trees(self._store, f"{self._folder}/{LOOSE_FILE}", list(self._loose.values()))

    def finish(self) -> None:
        """All trees are there: the folder is complete."""
        assert not self._open, self.missing
        self._store.delete(f"{self._folder}/{LOOSE_FILE}")
        self._store.finish(self._folder, {"trees": sum(map(len, self._shards.values()))})

    def _ids(self, path: str) -> list[str]:
        return [tree.prompt_id for tree in self._read(path)]

    def _read(self, path: str) -> list[Tree]:
        try:
            return read_trees(self._store, path) if self._store.exists(path) else []
        except StoreError:
            return []  # torn: its trees are grown again
