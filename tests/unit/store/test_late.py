"""Network mounts that show late what another machine has written, or forget which file a name means."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from mavis_dist.store import files, layout, values
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.shards import Labels, read_labels, shard_names, write_labels

LOOKS = 4


class Mount(LocalFileSystem):
    """Another machine's view: does not show files of some names at the first looks at them."""

    cachable = False

    def __init__(self, *late: str):
        super().__init__()
        self.late = dict.fromkeys(late, LOOKS)
        self.problems = Counter[int]()  # by error number: how often reading fails with it

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        self._fail(errno.EIO)
        found: dict[str, Any] = super().info(path, **kwargs)
        name = found["name"].rpartition("/")[2]
        if self.late.get(name, 0) > 0:
            self.late[name] -= 1
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return found

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._fail(errno.ESTALE)
        if self.late.get(path.rpartition("/")[2], 0) > 0:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        data: bytes = super().cat_file(path, **kwargs)
        return data

    def _fail(self, number: int) -> None:
        if self.problems[number] > 0:
            self.problems[number] -= 1
            raise OSError(number, {errno.EIO: "Input/output error", errno.ESTALE: "Stale file handle"}[number])


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LATE_S", 1.0)


@pytest.fixture
def writer(tmp_path: Path) -> Store:
    return Store(str(tmp_path), "run")


def mounted(writer: Store, *late: str) -> tuple[Store, Mount]:
    reader = Store(writer.storage, writer.run)
    reader._fs = mount = Mount(*late)
    return reader, mount


@pytest.mark.parametrize("late", [(MARKER,), ("model",), ("i0", MARKER, "model")])
def test_a_model_that_another_machine_has_finished_is_waited_for(writer: Store, late: tuple[str, ...]) -> None:
    """The marker may be visible before the files that were written earlier."""
    folder = layout.value_folder("brief", 0)
    writer.write_bytes(f"{folder}/model", b"weights")
    writer.finish(folder, {"n": 1})
    reader, _ = mounted(writer, *late)
    assert reader.metadata(folder) is None
    assert (values.fetch(reader, "brief", 0) / "model").read_bytes() == b"weights"
    values.publish(mounted(writer, *late)[0], "brief", 0)
    assert reader.metadata(folder) == {"n": 1}


def test_a_shard_that_another_machine_has_named_is_waited_for(writer: Store) -> None:
    write_labels(writer, "part-00000.parquet", [Labels("p", np.array([3], np.int32), np.array([0.5]))])
    reader, _ = mounted(writer, "part-00000.parquet")
    [labels] = read_labels(reader, "part-00000.parquet")
    assert labels.score.tolist() == [0.5]


def test_a_shared_model_is_found_though_the_marker_that_names_it_is_late(writer: Store) -> None:
    writer.finish(layout.value_folder("brief", 0), {values.SHARED_KEY: "shared/all/i0"})
    writer.write_bytes("shared/all/i0/model", b"weights")
    writer.finish("shared/all/i0", {})
    reader, _ = mounted(writer, MARKER)
    assert (values.fetch(reader, "brief", 0) / "model").read_bytes() == b"weights"


def test_no_shard_is_left_out_because_it_is_late(writer: Store) -> None:
    names = [f"part-0000{k}.parquet" for k in range(3)]
    for name in names:
        writer.write_bytes(f"labels/{name}", b"x")
    assert shard_names(writer_that_finishes(writer, names), "labels") == names
    assert shard_names(mounted(writer, names[1])[0], "labels") == names
    writer.delete(f"labels/{names[1]}")
    with pytest.raises(StoreError, match="run/labels is not finished"):
        shard_names(writer, "labels")


def writer_that_finishes(writer: Store, names: list[str]) -> Store:
    """A machine that writes the marker of files that others have written."""
    driver, _ = mounted(writer, names[2])
    driver.finish("labels", {}, names)
    assert list(driver.read_json(f"labels/{MARKER}")["files"]) == names
    return driver


def test_a_file_that_never_appears_is_named(writer: Store) -> None:
    writer.write_bytes("stage/a", b"x")
    with pytest.raises(StoreError, match=r"run/stage lacks b, c on machine .*: give storage that all machines share"):
        writer.finish("stage", {}, ["a", "b", "c"])
    assert not writer.exists(f"stage/{MARKER}")
    assert not writer.file_appears("stage/b")
    assert mounted(writer, "a")[0].file_appears("stage/a")


def test_a_file_that_another_machine_replaces_is_opened_again(writer: Store) -> None:
    writer.write_json("published.json", {"iteration": 1})
    reader, mount = mounted(writer)
    mount.problems[errno.ESTALE] = 2
    assert reader.read_json("published.json") == {"iteration": 1}
    mount.problems[errno.ESTALE] = 99
    with pytest.raises(StoreError, match=r"published\.json cannot be read \(Stale file handle\): check the storage"):
        reader.read_json("published.json")


def test_a_mount_that_fails_is_not_taken_for_an_empty_one(writer: Store) -> None:
    writer.finish("stage", {})
    reader, mount = mounted(writer)
    for operation in (reader.exists, reader.list, reader.metadata, reader.appears):
        mount.problems[errno.EIO] = 1
        with pytest.raises(StoreError, match=r"cannot be read \(Input/output error\)"):
            operation("stage")
        assert operation("stage") is not False
