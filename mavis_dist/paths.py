"""Paths as people write them, made to mean the same in every process and working directory. Reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path, PurePath

FILES = (".gguf", ".jsonl", ".parquet")
LOCAL = re.compile(r"(file|local):(//localhost(?=/)|//)?")
ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]*):/(?!/)", re.IGNORECASE)


def absolute(path: str) -> str:
    """A local path with `~` expanded and absolute; any other URI as it is. Blanks around it are dropped.

    Raises:
        ValueError: there is no such home, or it would be a folder of another name than is meant.
    """
    path = path.strip()
    path = path.removeprefix(found[0]) if (found := LOCAL.match(path)) else path
    if "$" in path:
        raise ValueError("variables are not expanded: write their values, or ~ for the home folder")
    if found := ONE_SLASH.match(path):
        raise ValueError(f"a URI has two slashes: write {found[1]}://")
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
    name = name.strip()
    is_fixed = name.startswith(("/", "~", "$")) or LOCAL.match(name) is not None
    is_local = is_fixed or name.startswith(".") or name.endswith(FILES) or os.path.exists(name)
    if name in words or not is_local:
        return name
    if not is_fixed and _is_package_copy(os.getcwd()):
        return name  # all processes of the job run in a copy, at another path in the next attempt
    return absolute(name)


def _is_package_copy(path: str) -> bool:
    """Whether a path lies where Ray unpacks the working directory of a job."""
    return {"runtime_resources", "working_dir_files"} <= set(PurePath(path).parts)
