"""The value models of a run, and which iteration of each is published.

A version names the model that is published for an objective at some time, so that running requests can keep it when
another one is published: `positive@i1` is the first iteration after the base model's, `positive@d5fa0ea24d` a distilled
model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mavis_dist.store.files import DamagedFile, Store, StoreError
from mavis_dist.store.layout import VALUES, distilled_folder, published_file, value_folder

# Folder names are built from the parts of this pattern, so that a version cannot name any other folder.
_VERSION = re.compile(r"(?P<objective>\w+)@(?:i(?P<iteration>\d+)|d(?P<distilled>\w+))", re.ASCII)


SHARED_KEY = "shared"  # in the marker of an objective's folder: the folder of the model that it shares


@dataclass(frozen=True)
class Served:
    """The model that is served for an objective."""

    objective: str
    iteration: int
    distilled: str | None = None  # name of the model that is served instead of the iteration it was distilled from

    @property
    def folder(self) -> str:
        return (
            value_folder(self.objective, self.iteration) if self.distilled is None else distilled_folder(self.distilled)
        )

    @property
    def version(self) -> str:
        return version(self.objective, self.folder)


def version(objective: str, path: str) -> str:
    """The version of an objective that the model in a folder is."""
    kind, _, name = path.partition("/")
    return f"{objective}@d{name}" if kind == "distilled" else f"{objective}@{name.rpartition('/')[2]}"


def objective_of(version: str) -> str:
    return version.partition("@")[0]


def folder_of(version: str) -> str:
    """The folder of a version's model; raises StoreError if `version` is not one."""
    named = _VERSION.fullmatch(version)
    if named is None:
        raise StoreError(f"there is no version {version!r} of an objective: use one like name@i0")
    if named["distilled"] is not None:
        return distilled_folder(named["distilled"])
    return value_folder(named["objective"], int(named["iteration"]))


def publish(store: Store, objective: str, iteration: int) -> None:
    """Serve a finished iteration; a distilled model that is already served instead of it is kept."""
    _check_finished(store, objective, iteration)
    pointer = published_file(objective)
    try:
        is_served = store.exists(pointer) and store.read_json(pointer)["iteration"] == iteration
    except DamagedFile:
        is_served = False  # damaged: written again
    if not is_served:
        store.write_json(pointer, {"iteration": iteration})


def publish_distilled(store: Store, objective: str, iteration: int, name: str | None) -> None:
    """Serve a distilled model instead of the iteration it was distilled from; None: the iteration itself."""
    _check_finished(store, objective, iteration)
    if name is not None and not store.appears(distilled_folder(name)):
        raise StoreError(f"the distilled model {name!r} is not finished in {store.root}: distil it first")
    store.write_json(published_file(objective), {"iteration": iteration} | ({"distilled": name} if name else {}))


def served(store: Store) -> dict[str, Served]:
    """objective -> the model that is served for it, sorted by name."""
    files = {name: published_file(name) for name in store.list(VALUES)}
    pointers = {name: store.read_json(file) for name, file in files.items() if store.exists(file)}
    return {name: Served(name, p["iteration"], p.get("distilled")) for name, p in pointers.items()}


def published(store: Store) -> dict[str, int]:
    """objective -> published iteration, sorted by name."""
    return {name: model.iteration for name, model in served(store).items()}


def published_folders(store: Store) -> dict[str, str]:
    """objective -> folder of the model that is served for it, its own or a shared one, sorted by name."""
    return {name: model_folder(store, model.folder) for name, model in served(store).items()}


def fetch(store: Store, objective: str, iteration: int) -> Path:
    """A local folder with a finished value model."""
    return fetch_folder(store, value_folder(objective, iteration))


def fetch_folder(store: Store, path: str) -> Path:
    """A local folder with the finished value model of a folder of an objective or of a distilled model."""
    return store.download(finished_folder(store, path))


def finished_folder(store: Store, path: str) -> str:
    """As `model_folder`; raises StoreError unless the value model is finished."""
    # In turn: a marker that is not visible yet does not say which folder is shared.
    if not (store.appears(path) and store.appears(folder := model_folder(store, path))):
        raise StoreError(f"there is no finished value model {path!r} in {store.root}")
    return folder


def model_folder(store: Store, path: str) -> str:
    """The folder of the weights: another one where several objectives share a value model."""
    folder: str = (store.metadata(path) or {}).get(SHARED_KEY, path)
    return folder


def _check_finished(store: Store, objective: str, iteration: int) -> None:
    if not store.appears(value_folder(objective, iteration)):
        raise StoreError(f"iteration {iteration} of {objective!r} is not finished in {store.root}: train it first")
