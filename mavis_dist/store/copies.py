"""Copies of remote folders on this machine, for libraries that read files. They end with the process that made them.

A process that is killed cannot delete its copies; the next one that makes any does. Each holds a lock on the folder of
its own copies, so that others see whether it lives, also from another container with the same temporary files.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from itertools import count
from pathlib import Path

PREFIX = "mavis-copies-"
STARTING_S = 60.0  # of a process, between its folder and the lock on it

_LOCK = threading.Lock()
_NUMBERS = count()
_own: Path | None = None
_finished: dict[Hashable, Path] = {}


def local_copy(content: Hashable | None, fetch: Callable[[Path], None]) -> Path:
    """A folder that `fetch` has filled; that of an earlier call with the same `content`, unless it is None.

    What `fetch` raises is raised, and leaves no folder behind.
    """
    with _LOCK:
        known = None if content is None else _finished.get(content)
        target = _own_folder() / str(next(_NUMBERS))
    if known is not None and known.is_dir():
        return known
    target.mkdir()
    try:
        fetch(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    if content is not None:
        with _LOCK:
            _finished[content] = target
    return target


def _own_folder() -> Path:
    global _own
    if _own is None:
        _delete_those_of_ended_processes()
        _own = Path(tempfile.mkdtemp(prefix=PREFIX))
        fcntl.flock(os.open(_own, os.O_RDONLY), fcntl.LOCK_EX)  # until this process ends
        atexit.register(shutil.rmtree, _own, ignore_errors=True)
    return _own


def _delete_those_of_ended_processes() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process deletes it, or it is another user's
            if time.time() - folder.stat().st_mtime < STARTING_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
