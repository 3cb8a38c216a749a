"""Whole files and whole folders on any fsspec file system (local or shared mount, s3, gs, hdfs).

A file is written under a temporary name, synced and renamed. A folder is finished when its marker exists, which is
written last and holds metadata of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mavis_dist.types import UserError

MARKER = "_COMPLETE.json"


class StoreError(UserError):
    """Storage that cannot be used, or a file in it that cannot be read."""


class Store:
    """One run's folder below a storage URI. Paths are relative to it, with forward slashes."""

    def __init__(self, storage: str, run: str):
        self.storage, self.run = storage, run
        try:
            self._fs, root = fsspec.url_to_fs(storage)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"storage {storage!r} cannot be opened: {error}") from None
        self.root = f"{root.rstrip('/')}/{run}"
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def check_writable(self) -> None:
        """Raises StoreError unless files can be created here; leaves no files behind."""
        with self.probe():
            pass

    @contextmanager
    def probe(self) -> Iterator[str]:
        """The name of an empty file, which is deleted in the end; raises StoreError if it cannot be created."""
        name, is_new = f".probe-{uuid.uuid4().hex}", not self.exists("")
        self._try(lambda: self.write_bytes(name, b""))
        try:
            yield name
        finally:
            self._try(lambda: self.delete(name))
            if is_new and self._is_local:
                with suppress(OSError):  # something was stored in the meantime
                    os.rmdir(self.root)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # every file system raises its own errors
            raise StoreError(
                f"storage {self.storage!r} cannot be written ({error}): give storage=URI that machine "
                f"{platform.node()} may write to"
            ) from None

    def exists(self, path: str) -> bool:
        return self._fs.exists(self._full(path))

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted, without temporary files; empty if the folder does not exist."""
        if not self.exists(folder):
            return []
        names = (info["name"].rstrip("/").rpartition("/")[2] for info in self._fs.ls(self._full(folder), detail=True))
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, path: str) -> None:
        if self.exists(path):
            self._fs.rm(self._full(path), recursive=True)

    def read_bytes(self, path: str) -> bytes:
        try:
            return self._fs.cat_file(self._full(path))
        except OSError as error:
            raise StoreError(f"{self._full(path)} cannot be read: {error}") from None

    def write_bytes(self, path: str, data: bytes) -> None:
        """The file appears whole or not at all."""
        full = self._full(path)
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        if not self._is_local:
            self._fs.pipe_file(full, data)  # object stores publish an object when its upload ends
            return
        try:
            write_whole(Path(full), data)
        except OSError as error:
            remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the storage"
            raise StoreError(
                f"{full} cannot be written ({error.strerror}): {remedy} and run again, what is finished stays"
            ) from error

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self._full(path)} is damaged ({error}): delete it and run again") from None

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1).encode())

    def finish(self, folder: str, metadata: dict[str, Any]) -> None:
        """Write the marker; all other files of the folder must exist by then, and must not change afterwards."""
        self.write_json(f"{folder}/{MARKER}", {"facts": metadata, "files": self._sizes(folder)})

    def metadata(self, folder: str) -> dict[str, Any] | None:
        """The metadata in the marker of a finished folder; None if the folder is not finished.

        A folder that lost a file, or part of one, is not finished: its work is repeated.
        """
        path = f"{folder}/{MARKER}"
        if not self.exists(path):
            return None
        try:
            marker = self.read_json(path)
            return marker["facts"] if marker["files"].items() <= self._sizes(folder).items() else None
        except (StoreError, KeyError, TypeError, AttributeError):
            return None  # this project writes no such marker

    def _sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file in a folder except its marker."""
        infos = self._fs.ls(self._full(folder), detail=True) if self.exists(folder) else []
        sizes = {info["name"].rpartition("/")[2]: info["size"] for info in infos if info["type"] == "file"}
        return {name: sizes[name] for name in sorted(sizes) if name != MARKER and not name.startswith(".")}

    def upload(self, source: Path, folder: str, metadata: dict[str, Any]) -> None:
        """Copy the files of a local folder, then write the marker."""
        for file in sorted(source.iterdir()):
            self.write_bytes(f"{folder}/{file.name}", file.read_bytes())
        self.finish(folder, metadata)

    def download(self, folder: str) -> Path:
        """A local folder with these files: the folder itself if storage is local, otherwise a temporary copy."""
        if self._is_local:
            return Path(self._full(folder))
        target = Path(tempfile.mkdtemp(prefix="mavis-"))
        try:
            self._fs.get(f"{self._full(folder)}/", f"{target}/", recursive=True)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return target

    def uri(self, path: str) -> str:
        """The URI of a path, for libraries that do their own writing."""
        return f"{self.storage.rstrip('/')}/{self.run}/{path}"

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def digest(inputs: Mapping[str, Any]) -> str:
    """A name of plain values, for files of what was computed from them: other values have another name."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """A local file appears whole and on disk, or not at all. `mode`: its permissions, less the umask.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
