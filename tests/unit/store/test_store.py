"""Files appear whole, markers are written last, and damage is named."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mavis_dist.core.tree import Finish, Tree, TreeBuilder
from mavis_dist.store import files, layout, values
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.shards import Labels, read_labels, read_trees, write_labels, write_trees
from mavis_dist.store.tree_folder import TreeFolder


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(files, "LATE_S", 0.1)
    if request.param == "s3":
        return Store(f"s3://{request.getfixturevalue('s3').bucket}/{tmp_path.name}", "run")
    return Store(str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}", "run")


def tree() -> Tree:
    builder = TreeBuilder("p", "base", -5, [1, 2, 3])
    first = builder.add(-1, 0, [4, 5], [0.5, -0.25], Finish.OPEN)
    builder.add(first, 2, [6], [0.125], Finish.STOP)
    builder.add(first, 2, [7, 8], [0.0, 1.5], Finish.LENGTH)
    return builder.build()


def test_a_folder_is_finished_when_it_has_a_marker(store: Store) -> None:
    store.write_bytes("stage/data", b"x")
    assert store.metadata("stage") is None
    store.finish("stage", {"n": 1})
    assert store.metadata("stage") == {"n": 1}


@pytest.mark.parametrize("damage", [b"", b'{"n"', b"\xff\xfe"])
def test_a_damaged_marker_is_ignored(store: Store, damage: bytes) -> None:
    store.write_bytes(f"stage/{MARKER}", damage)
    assert store.metadata("stage") is None


def test_a_damaged_file_is_named(store: Store) -> None:
    store.write_bytes("a.json", b"{")
    with pytest.raises(StoreError, match=r"run/a\.json is damaged"):
        store.read_json("a.json")
    store.write_bytes("t.parquet", b"PAR1 nothing")
    with pytest.raises(StoreError, match=r"run/t\.parquet is damaged"):
        read_trees(store, "t.parquet")
    with pytest.raises(StoreError, match="nowhere"):
        store.read_bytes("nowhere")


def test_a_failed_write_keeps_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path), "run")
    store.write_bytes("f", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.write_bytes("f", b"new")
    assert store.read_bytes("f") == b"old"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["f"]


def test_unwritable_storage_is_rejected(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(occupied), "run").check_writable()
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("nosuchprotocol://x", "run")
    assert stat.S_ISREG(occupied.stat().st_mode)


def test_checking_storage_leaves_no_files(store: Store) -> None:
    store.check_writable()
    assert store.list("") == []


def test_trees_and_labels_survive_a_round_trip(store: Store) -> None:
    written = tree()
    write_trees(store, "t.parquet", [written, written])
    read, _ = read_trees(store, "t.parquet")
    for name in Tree.__dataclass_fields__:
        before, after = getattr(written, name), getattr(read, name)
        assert np.array_equal(before, after), name
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype, name
    labels = Labels("p", np.array([1, 2], dtype=np.int32), np.array([0.1, -3.0]))
    write_labels(store, "l.parquet", [labels])
    [back] = read_labels(store, "l.parquet")
    assert back.prompt_id == "p"
    assert np.array_equal(back.node, labels.node)
    assert np.array_equal(back.score, labels.score)
    assert len(back.token) == len(back.prefix_score) == 0


def test_labels_hold_the_scores_of_unfinished_answers_if_there_are_any(store: Store) -> None:
    """Files that were written without them can be read."""
    labels = Labels("p", np.array([1], np.int32), np.array([0.5]), np.array([7, 9], np.int32), np.array([0.1, 0.2]))
    write_labels(store, "l.parquet", [labels])
    [back] = read_labels(store, "l.parquet")
    assert back.token.tolist() == [7, 9]
    assert back.token.dtype == np.int32
    assert back.prefix_score.tolist() == [0.1, 0.2]

    older = pq.read_table(io.BytesIO(store.read_bytes("l.parquet"))).drop_columns(["token", "prefix_score"])
    buffer = io.BytesIO()
    pq.write_table(older, buffer)
    store.write_bytes("older.parquet", buffer.getvalue())
    [back] = read_labels(store, "older.parquet")
    assert back.score.tolist() == [0.5]
    assert len(back.token) == len(back.prefix_score) == 0

    pq.write_table(older.drop_columns(["score"]), buffer := io.BytesIO())
    store.write_bytes("damaged.parquet", buffer.getvalue())
    with pytest.raises(StoreError, match="damaged"):
        read_labels(store, "damaged.parquet")


def test_only_finished_iterations_can_be_published(store: Store) -> None:
    with pytest.raises(StoreError, match=r"iteration 0 of 'a' is not finished .* train it first"):
        values.publish(store, "a", 0)
    store.finish(layout.value_folder("a", 0), {})
    values.publish(store, "a", 0)
    assert values.published(store) == {"a": 0}
    store.finish(layout.value_folder("a", 1), {})
    values.publish(store, "a", 1)
    assert values.published(store) == {"a": 1}


def test_a_folder_can_be_fetched_from_any_storage(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "made"
    source.mkdir()
    (source / "config.json").write_text("{}")
    store.upload(source, layout.value_folder("a", 0), {"iteration": 0})
    assert (values.fetch(store, "a", 0) / "config.json").read_text() == "{}"
    with pytest.raises(StoreError, match="no finished value model"):
        values.fetch(store, "a", 1)


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_folder_that_lost_a_file_is_not_finished(store: Store, damage: str) -> None:
    for name in ("a", "b"):
        store.write_bytes(f"stage/{name}", b"1234")
    store.finish("stage", {"n": 1})
    store.write_bytes("stage/later", b"more does no harm")
    assert store.metadata("stage") == {"n": 1}
    store.write_bytes("stage/a", b"12") if damage == "truncate" else store.delete("stage/a")
    assert store.metadata("stage") is None


def test_a_full_disk_is_an_error_and_keeps_the_old_files(tmp_path: Path) -> None:
    """A real file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        store = Store(str(disk), "run")
        store.write_bytes("stage/file", b"good")
        with pytest.raises(StoreError, match=r"stage/file cannot be written \(No space left on device\): free some"):
            store.write_bytes("stage/file", b"x" * 2**21)
        assert store.read_bytes("stage/file") == b"good"
        assert [path.name for path in (disk / "run/stage").iterdir()] == ["file"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- trees in any order -------------------------------------------------------------------------------------------

IDS = ["p0", "p1", "p2", "p3", "p4"]


def folder(store: Store) -> TreeFolder:
    return TreeFolder(store, "rollouts/base", IDS, 2)


def named(prompt_id: str) -> Tree:
    return replace(tree(), prompt_id=prompt_id)


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read_bytes(f"rollouts/base/{name}") for name in store.list("rollouts/base")}


def test_shards_do_not_depend_on_the_order_of_the_trees(store: Store) -> None:
    expected = None
    for order in (IDS, IDS[::-1], ["p3", "p0", "p4", "p2", "p1"]):
        store.delete("rollouts")
        trees = folder(store)
        for number, prompt_id in enumerate(order):
            assert set(order[number:]) <= {id_ for ids in trees.missing for id_ in ids}
            trees.add(named(prompt_id))
            trees.add(named(prompt_id))
        trees.finish()
        expected = expected or contents(store)
        assert contents(store) == expected
    assert sorted(expected) == [MARKER, "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_finished_shards_are_kept_and_damaged_ones_are_missing(store: Store) -> None:
    trees = folder(store)
    for prompt_id in ("p0", "p1", "p2", "p4"):
        trees.add(named(prompt_id))
    again = folder(store)
    assert again.missing == [["p2", "p3"]]
    for prompt_id in ("p3", "p2"):
        again.add(named(prompt_id))
    again.finish()
    whole = contents(store)

    store.write_bytes("rollouts/base/part-00001.parquet", whole["part-00001.parquet"][:-9])
    assert store.metadata("rollouts/base") is None
    mended = folder(store)
    assert mended.missing == [["p2", "p3"]]
    for prompt_id in ("p2", "p3"):
        mended.add(named(prompt_id))
    mended.finish()
    assert contents(store) == whole
