"""Where value models lie in a run, and which iteration of each is published."""

from __future__ import annotations

from pathlib import Path

from mavis_dist.store.files import Store, StoreError

METRICS_FILE = "metrics.jsonl"  # what was measured while a value model was trained, in its folder


def folder(objective: str, iteration: int) -> str:
    return f"values/{objective}/i{iteration}"


def publish(store: Store, objective: str, iteration: int) -> None:
    """Make a finished iteration the one that is served."""
    if store.facts(folder(objective, iteration)) is None:
        raise StoreError(f"iteration {iteration} of {objective!r} is not finished in {store.root}: train it first")
    store.write_json(f"values/{objective}/published.json", {"iteration": iteration})


def published(store: Store) -> dict[str, int]:
    """objective -> iteration of everything that is published, sorted by name."""
    pointers = {name: f"values/{name}/published.json" for name in store.list("values")}
    return {name: store.read_json(path)["iteration"] for name, path in pointers.items() if store.exists(path)}


def fetch(store: Store, objective: str, iteration: int) -> Path:
    """A local folder with a finished value model."""
    if store.facts(folder(objective, iteration)) is None:
        raise StoreError(f"there is no finished value model {folder(objective, iteration)!r} in {store.root}")
    return store.download(folder(objective, iteration))
