"""Where value models lie in a run, and which iteration of each is published."""

from __future__ import annotations

from pathlib import Path

from mavis_dist.store.files import Store, StoreError

METRICS_FILE = "metrics.jsonl"  # what was measured while a value model was trained, in its folder


def folder(objective: str, iteration: int) -> str:
    return f"values/{objective}/i{iteration}"


def distilled_folder(name: str) -> str:
    return f"distilled/{name}"


def gate_folder(objective: str, iteration: int) -> str:
    """Where the decision about an iteration is kept."""
    return f"gate/{objective}/i{iteration}"


def publish(store: Store, objective: str, iteration: int) -> None:
    """Make a finished iteration the one that is served; a distilled model that is served for it stays."""
    _check_finished(store, objective, iteration)
    pointer = _pointer_file(objective)
    try:
        is_served = store.exists(pointer) and store.read_json(pointer)["iteration"] == iteration
    except StoreError:
        is_served = False  # torn: written anew
    if not is_served:
        store.write_json(pointer, {"iteration": iteration})


def publish_distilled(store: Store, objective: str, iteration: int, name: str | None) -> None:
    """Serve a distilled model in place of the iteration that it learnt from; None: the iteration itself."""
    _check_finished(store, objective, iteration)
    if name is not None and store.facts(distilled_folder(name)) is None:
        raise StoreError(f"the distilled model {name!r} is not finished in {store.root}: distil it first")
    store.write_json(_pointer_file(objective), {"iteration": iteration} | ({"distilled": name} if name else {}))


def published(store: Store) -> dict[str, int]:
    """objective -> iteration of everything that is published, sorted by name."""
    return {name: pointer["iteration"] for name, pointer in _pointers(store).items()}


def published_folders(store: Store) -> dict[str, str]:
    """objective -> folder of the model that is served for it, its own or a distilled one, sorted by name."""
    return {
        name: distilled_folder(pointer["distilled"]) if "distilled" in pointer else folder(name, pointer["iteration"])
        for name, pointer in _pointers(store).items()
    }


def fetch(store: Store, objective: str, iteration: int) -> Path:
    """A local folder with a finished value model."""
    return fetch_folder(store, folder(objective, iteration))


def fetch_folder(store: Store, path: str) -> Path:
    """A local folder with a finished value model, distilled or not."""
    if store.facts(path) is None:
        raise StoreError(f"there is no finished value model {path!r} in {store.root}")
    return store.download(path)


def _pointers(store: Store) -> dict[str, dict]:
    files = {name: _pointer_file(name) for name in store.list("values")}
    return {name: store.read_json(file) for name, file in files.items() if store.exists(file)}


def _check_finished(store: Store, objective: str, iteration: int) -> None:
    if store.facts(folder(objective, iteration)) is None:
        raise StoreError(f"iteration {iteration} of {objective!r} is not finished in {store.root}: train it first")


def _pointer_file(objective: str) -> str:
    return f"values/{objective}/published.json"
