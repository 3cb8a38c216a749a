"""Trees and labels as parquet: one row per tree, flat arrays, no pickle."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mavis_dist.core.tree import Tree
from mavis_dist.store.files import DamagedFile, Store, StoreError

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
LABEL_SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "node": pa.list_(pa.int32()),
        "score": pa.list_(pa.float64()),
        "token": pa.list_(pa.int32()),
        "prefix_score": pa.list_(pa.float64()),
    }
)
TEACHER_SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "policy": pa.string(),
        "state": pa.list_(pa.int32()),
        "candidate": pa.list_(pa.int32()),
        "values": pa.list_(pa.float32()),
    }
)


@dataclass(frozen=True, eq=False)
class Labels:
    """Raw rewards of one tree's leaves, and of its unfinished answers where they were scored as well."""

    prompt_id: str
    node: np.ndarray  # int32
    score: np.ndarray  # float64, in the reward's own unit
    token: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # the last of each unfinished answer
    prefix_score: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64, of the answer up to it


@dataclass(frozen=True, eq=False)
class TeacherValues:
    """The values of one tree's tokens, and of candidates at some of them, by the teachers of a distillation."""

    prompt_id: str
    policy: str
    state: np.ndarray  # int32, which labelled token each candidate follows
    candidate: np.ndarray  # int32, tokens
    values: np.ndarray  # float32, of labelled tokens and then candidates, all teachers' side by side


def shard_names(store: Store, folder: str) -> list[str]:
    """Files of trees or labels in a finished folder, in order; raises StoreError if it is not finished."""
    if not store.appears(folder):
        raise StoreError(f"{store.root}/{folder} is not finished: run the pipeline again")
    return [name for name in store.list(folder) if name.endswith(".parquet")]


def write_trees(store: Store, path: str, trees: Sequence[Tree]) -> None:
    _write_rows(store, path, trees, TREE_SCHEMA)


def read_trees(store: Store, path: str) -> list[Tree]:
    return [Tree(**row) for row in _read(store, path, TREE_SCHEMA)]


def write_labels(store: Store, path: str, labels: Sequence[Labels]) -> None:
    _write_rows(store, path, labels, LABEL_SCHEMA)


def read_labels(store: Store, path: str) -> list[Labels]:
    return [Labels(**row) for row in _read(store, path, LABEL_SCHEMA, optional=("token", "prefix_score"))]


def write_teacher_values(store: Store, path: str, found: Sequence[TeacherValues]) -> None:
    _write_rows(store, path, found, TEACHER_SCHEMA)


def read_teacher_values(store: Store, path: str) -> list[TeacherValues]:
    return [TeacherValues(**row) for row in _read(store, path, TEACHER_SCHEMA)]


def _write_rows(store: Store, path: str, items: Sequence[Any], schema: pa.Schema) -> None:
    rows = [{name: getattr(item, name) for name in schema.names} for item in items]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    store.write_bytes(path, buffer.getvalue())


def _read(store: Store, path: str, schema: pa.Schema, optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a file, lists as arrays; without those optional columns that it lacks."""
    data = store.read_bytes(path, is_known=True)
    try:
        table = pq.read_table(io.BytesIO(data))
        found = [column for column in schema if column.name not in optional or column.name in table.column_names]
        rows = table.cast(pa.schema(found)).to_pylist()
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DamagedFile(f"{store.root}/{path} is damaged ({error}): delete it and run again") from None
    types = {column.name: column.type.value_type for column in found if pa.types.is_list(column.type)}
    return [
        {name: np.array(x, dtype=types[name].to_pandas_dtype()) if name in types else x for name, x in row.items()}
        for row in rows
    ]
