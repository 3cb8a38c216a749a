"""Trees and labels as parquet: one row per tree, flat arrays, no pickle."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mavis_dist.core.tree import Tree
from mavis_dist.store.files import Store, StoreError

TREE_SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "policy": pa.string(),
        "seed": pa.int64(),
        "prompt_tokens": pa.list_(pa.int32()),
        "node_parent": pa.list_(pa.int32()),
        "node_cut": pa.list_(pa.int32()),
        "node_start": pa.list_(pa.int32()),
        "node_finish": pa.list_(pa.int8()),
        "tokens": pa.list_(pa.int32()),
        "token_logratio": pa.list_(pa.float32()),
    }
)
LABEL_SCHEMA = pa.schema({"prompt_id": pa.string(), "node": pa.list_(pa.int32()), "score": pa.list_(pa.float64())})


@dataclass(frozen=True, eq=False)
class Labels:
    """Raw rewards of one tree's leaves."""

    prompt_id: str
    node: np.ndarray  # int32
    score: np.ndarray  # float64, in the reward's own unit


def shard_names(store: Store, folder: str) -> list[str]:
    """Files of trees or labels in a folder, in order."""
    return [name for name in store.list(folder) if name.endswith(".parquet")]


def write_trees(store: Store, path: str, trees: Sequence[Tree]) -> None:
    rows = [{f.name: getattr(tree, f.name) for f in fields(Tree)} for tree in trees]
    _write(store, path, pa.Table.from_pylist(rows, schema=TREE_SCHEMA))


def read_trees(store: Store, path: str) -> list[Tree]:
    return [_tree(row) for row in _read(store, path, TREE_SCHEMA).to_pylist()]


def _tree(row: dict[str, Any]) -> Tree:
    for field in TREE_SCHEMA:
        if pa.types.is_list(field.type):
            row[field.name] = np.array(row[field.name], dtype=field.type.value_type.to_pandas_dtype())
    return Tree(**row)


def write_labels(store: Store, path: str, labels: Sequence[Labels]) -> None:
    rows = [{"prompt_id": item.prompt_id, "node": item.node, "score": item.score} for item in labels]
    _write(store, path, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))


def read_labels(store: Store, path: str) -> list[Labels]:
    return [
        Labels(row["prompt_id"], np.array(row["node"], dtype=np.int32), np.array(row["score"], dtype=np.float64))
        for row in _read(store, path, LABEL_SCHEMA).to_pylist()
    ]


def _write(store: Store, path: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes(path, buffer.getvalue())


def _read(store: Store, path: str, schema: pa.Schema) -> pa.Table:
    data = store.read_bytes(path)
    try:
        return pq.read_table(io.BytesIO(data)).cast(schema)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise StoreError(f"{store.root}/{path} is damaged ({error}): delete it and run again") from None
