"""Paths as people write them, made to mean the same in every process and working directory. Reads no file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePath

FILES = (".gguf", ".jsonl", ".parquet")
LOCAL = ("file://", "local://")


def absolute(path: str) -> str:
    """A local path with `~` expanded and absolute; any other URI as it is.

    Raises:
        ValueError: there is no such home.
    """
    for scheme in LOCAL:
        path = path.removeprefix(scheme)
    if "://" in path:
        return path
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:  # no home of this user or of the one named
        raise ValueError(f"the home folder is unknown ({str(error).rstrip('.')}): give an absolute path") from None
    # Not resolved: a symbolic link may lead elsewhere on another machine.
    return os.path.abspath(expanded)


def for_results(path: str) -> str:
    """As `absolute`; raises ValueError where nobody would find the results."""
    place = absolute(path)
    if _is_package_copy(place):
        raise ValueError(
            "a job runs in Ray's copy of its working directory, where nobody finds results: give an absolute path on "
            "storage that all machines share, or a URI"
        )
    return place


def for_input(name: str, words: Collection[str] = ()) -> str:
    """A file or folder as in `absolute`; names of other things, such as `words` and ids of a hub, as they are."""
    is_local = name.startswith((".", "/", "~", *LOCAL)) or name.endswith(FILES) or os.path.exists(name)
    if name in words or not is_local:
        return name
    if not name.startswith(("/", "~", *LOCAL)) and _is_package_copy(os.getcwd()):
        return name  # all processes of the job run in a copy, at another path in the next attempt
    return absolute(name)


def _is_package_copy(path: str) -> bool:
    """Whether a path lies where Ray unpacks the working directory of a job."""
    return {"runtime_resources", "working_dir_files"} <= set(PurePath(path).parts)
