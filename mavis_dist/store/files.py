"""Whole files and whole folders on any fsspec file system (local or shared mount, s3, gs, hdfs).

A local file is written under a temporary name, synced and renamed; an object appears when its upload ends. A folder is
finished when its marker exists, which is written last and holds metadata of the folder.

Object stores show at once what any machine has written. Network mounts may show it late, and in another order: what
another process is known to have written is waited for (`appears`, `finish`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mavis_dist.store.copies import local_copy
from mavis_dist.types import UserError, one_line

MARKER = "_COMPLETE.json"
LATE_S = 10.0  # that a mount may take to show what another machine has written
STALE_TRIES = 5  # of reading a file that another machine replaces

Result = TypeVar("Result")


class StoreError(UserError):
    """Storage that cannot be used, or a file in it that cannot be read."""


class DamagedFile(StoreError):
    """A file that can be read, but does not hold what was written: its work is repeated."""


class Store:
    """One run's folder below a storage URI. Paths are relative to it, with forward slashes."""

    def __init__(self, storage: str, run: str):
        self.storage, self.run = storage, run
        try:
            # Other processes write here: listings must not come from a cache.
            self._fs, root = fsspec.url_to_fs(storage, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"storage {storage!r} cannot be opened: {error}") from None
        self._is_local = isinstance(self._fs, LocalFileSystem)
        root = f"{root.rstrip('/')}/{run}"
        self.root: str = root if self._is_local else self._fs.unstrip_protocol(root)

    def check_writable(self) -> None:
        """Raises StoreError unless files can be created here; leaves no files behind."""
        with self.probe():
            pass

    @contextmanager
    def probe(self) -> Iterator[str]:
        """The name of an empty file, which is deleted in the end; raises StoreError if it cannot be created."""
        name, is_new = f".probe-{uuid.uuid4().hex}", not self.exists("")
        self._try(lambda: self._write(self._full(name), b""))
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
                f"storage {self.storage!r} cannot be written ({_reason(error)}): give storage=URI that machine "
                f"{platform.node()} may write to, and its credentials"
            ) from None

    def exists(self, path: str) -> bool:
        return self._read(path, self._fs.info) is not None

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted, without temporary files; empty if the folder does not exist."""
        return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in self._infos(folder))

    def delete(self, path: str) -> None:
        """Also of what does not exist."""
        self._try_to("deleted", path, lambda full: self._fs.rm(full, recursive=True))

    def read_bytes(self, path: str, is_known: bool = False) -> bytes:
        """`is_known`: the file was written, maybe a moment ago by another machine, and is waited for."""
        data = self._read(path, self._fs.cat_file)
        if data is None and is_known and self.file_appears(path):
            data = self._read(path, self._fs.cat_file)
        if data is None:
            raise self._problem("read", path, FileNotFoundError())
        return data

    def _read(self, path: str, action: Callable[[str], Result]) -> Result | None:
        return self._try_to("read", path, action)

    def _try_to(self, do: str, path: str, action: Callable[[str], Result]) -> Result | None:
        """What `action` returns for the full path; None if nothing exists there. Raises StoreError."""
        for _ in range(STALE_TRIES):
            try:
                return action(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except Exception as error:  # every file system raises its own errors
                problem = self._problem(do, path, error)
                if getattr(error, "errno", None) != errno.ESTALE:  # opening it again finds the new file
                    break
        raise problem

    def _problem(self, do: str, path: str, error: Exception) -> StoreError:
        return StoreError(
            f"{self._full(path)} cannot be {do} ({_reason(error)}): check the storage, and its address and credentials "
            f"on machine {platform.node()}"
        )

    def write_bytes(self, path: str, data: bytes) -> None:
        """The file appears whole or not at all."""
        full = self._full(path)
        try:
            self._write(full, data)
        except Exception as error:  # every file system raises its own errors
            is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if is_full else "check the storage"
            raise StoreError(
                f"{full} cannot be written ({_reason(error)}): {remedy} and run again, what is finished stays"
            ) from error

    def _write(self, full: str, data: bytes) -> None:
        if self._is_local:
            os.makedirs(os.path.dirname(full), exist_ok=True)
            write_whole(Path(full), data)
        else:
            self._fs.pipe_file(full, data)  # without makedirs, which would create a bucket whose name is misspelt

    def read_json(self, path: str) -> Any:
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedFile(f"{self._full(path)} is damaged ({error}): delete it and run again") from None

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1).encode())

    def finish(self, folder: str, metadata: dict[str, Any], written: Collection[str] = ()) -> None:
        """Write the marker; all other files of the folder must exist by then, and must not change afterwards.

        `written`: names of files that other machines have written; raises StoreError if one does not appear.
        """
        missing = set(written)

        def is_complete() -> bool:
            missing.difference_update(self._sizes(folder))
            return not missing

        if not self._wait(is_complete):
            raise StoreError(
                f"{self._full(folder)} lacks {', '.join(sorted(missing))} on machine {platform.node()}, which another "
                "machine has written: give storage that all machines share, and mount it with actimeo=3 if it is NFS"
            )
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
        except (DamagedFile, KeyError, TypeError, AttributeError):
            return None  # this project writes no such marker

    def appears(self, folder: str) -> bool:
        """Whether a folder is finished, after a wait for one that another machine has just finished."""
        return self._wait(lambda: self.metadata(folder) is not None)

    def file_appears(self, path: str) -> bool:
        """Whether a file exists, after a wait for one that another machine has just written."""
        return self._wait(lambda: self.exists(path))

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Whether a condition holds, on mounts after up to LATE_S."""
        until = time.monotonic() + (LATE_S if self._is_local else 0.0)
        while not condition():
            if time.monotonic() >= until:
                return False
            time.sleep(LATE_S / 50)
        return True

    def _sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file in a folder except its marker."""
        infos = self._infos(folder)
        sizes = {info["name"].rpartition("/")[2]: info["size"] for info in infos if info["type"] == "file"}
        return {name: sizes[name] for name in sorted(sizes) if name != MARKER}

    def _infos(self, folder: str) -> Iterator[dict[str, Any]]:
        """What is in a folder, without temporary files."""
        full = self._full(folder)
        for info in self._read(folder, lambda full: self._fs.ls(full, detail=True)) or ():
            # Some programs create an object with a folder's own name.
            if not full.endswith(info["name"].strip("/")) and not info["name"].rpartition("/")[2].startswith("."):
                yield info

    def upload(self, source: Path, folder: str, metadata: dict[str, Any]) -> None:
        """Copy the files of a local folder, then write the marker."""
        for file in sorted(source.iterdir()):
            self.write_bytes(f"{folder}/{file.name}", file.read_bytes())
        self.finish(folder, metadata)

    def download(self, folder: str) -> Path:
        """A local folder with these files, not to be changed: the folder itself if storage is local, otherwise a copy,
        which ends with this process.
        """
        if self._is_local:
            return Path(self._full(folder))
        marker = self._read(f"{folder}/{MARKER}", self._fs.cat_file)
        return local_copy(None if marker is None else (self.root, folder, marker), partial(self._get, folder))

    def _get(self, folder: str, target: Path) -> None:
        if self._read(folder, lambda full: [self._fs.get(f"{full}/", f"{target}/", recursive=True)]) is None:
            raise self._problem("read", folder, FileNotFoundError())

    def uri(self, path: str) -> str:
        """The URI of a path, for libraries that do their own writing."""
        return f"{self.storage.rstrip('/')}/{self.run}/{path}"

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def _reason(error: Exception) -> str:
    """What a file system says about a failure."""
    if isinstance(error, FileNotFoundError) and not error.strerror and "does not exist" not in str(error):
        return "no such file"  # its message is the path
    return one_line(getattr(error, "strerror", None) or error)


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
