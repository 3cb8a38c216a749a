"""With this folder on PYTHONPATH, a process sees files of others late, as on a network mount.

Below the folder LATE_ROOT, a file that another process has written appears LATE_S seconds after it was written. Counts
in the folder LATE_SEEN how often a file that is there was not shown.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any

from fsspec.implementations.local import LocalFileSystem

ROOT, DELAY_S, SEEN = os.environ["LATE_ROOT"], float(os.environ["LATE_S"]), os.environ["LATE_SEEN"]
_own = set[str]()  # files that this process has written
_replace = os.replace


def replace(source: Any, target: Any, **options: Any) -> None:
    _replace(source, target, **options)
    _own.add(os.path.realpath(target))


def is_late(path: str) -> bool:
    path = os.path.realpath(path)
    if not path.startswith(ROOT) or path in _own or not os.path.isfile(path):
        return False
    late = time.time() - os.stat(path).st_mtime < DELAY_S
    if late:
        with open(os.path.join(SEEN, str(os.getpid())), "a") as file:
            file.write(f"{path}\n")
    return late


def looking(method: Callable[..., Any]) -> Callable[..., Any]:
    def look(self: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if is_late(self._strip_protocol(path)):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return method(self, path, *arguments, **options)

    return look


def listing(method: Callable[..., Any]) -> Callable[..., Any]:
    def look(self: Any, path: Any, detail: bool = False, **options: Any) -> Any:
        found = method(self, path, detail=True, **options)
        shown = [info for info in found if not is_late(info["name"])]
        return shown if detail else [info["name"] for info in shown]

    return look


os.replace = replace  # type: ignore[assignment]
for name in ("info", "cat_file"):
    setattr(LocalFileSystem, name, looking(getattr(LocalFileSystem, name)))
LocalFileSystem.ls = listing(LocalFileSystem.ls)
