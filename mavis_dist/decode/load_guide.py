"""The published value models of a run as a guide; objectives of one distilled model share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mavis_dist.decode.local_guide import LocalGuide
from mavis_dist.models import qhead, value
from mavis_dist.models.load import BaseModel
from mavis_dist.models.qhead import Student
from mavis_dist.models.value import Card, ValueModel
from mavis_dist.store import values
from mavis_dist.store.files import Store


def fetch_published(store: Store) -> dict[str, Path]:
    """objective -> local folder of the model that is served for it; objectives of one model have the same folder."""
    folders = values.published_folders(store)
    local = {folder: values.fetch_folder(store, folder) for folder in set(folders.values())}
    return {name: local[folder] for name, folder in folders.items()}


def read_card(store: Store, path: str) -> Card:
    """The card of a stored value model, without its weights; `path` as in `values.fetch_folder`.

    Raises:
        StoreError: it is not finished.
        ValueModelError: the card is damaged.
    """
    file = f"{values.finished_folder(store, path)}/{value.CARD_FILE}"
    return value.parse_card(store.read_bytes(file), f"{store.root}/{file}")


def load_models(
    folders: Mapping[str, Path],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    base: BaseModel | None = None,
) -> dict[str, tuple[ValueModel, int]]:
    """objective -> (value model, which of its heads), every folder loaded once; arguments and errors: `value.load`."""
    loaded = {folder: value.load(folder, dtype, device, base) for folder in set(folders.values())}
    return {name: (loaded[folder][0], loaded[folder][1].objectives.index(name)) for name, folder in folders.items()}


def load_students(
    folders: Mapping[str, Path], models: Mapping[str, tuple[ValueModel, int]]
) -> dict[str, tuple[Student, int]]:
    """objective -> (student, which of its objectives) where its model was distilled; raises ValueModelError."""
    owners = {folders[name]: model for name, (model, _) in models.items()}
    cards = {folder: value.load_card(folder) for folder in owners}
    students = {
        folder: qhead.load(folder, model, cards[folder].state_layer)
        for folder, model in owners.items()
        if cards[folder].teachers
    }
    return {name: (students[folder], models[name][1]) for name, folder in folders.items() if folder in students}


def load_guide(
    folders: Mapping[str, Path],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    base: BaseModel | None = None,
) -> LocalGuide:
    """A guide of these models and their students; arguments and errors: `value.load`."""
    models = load_models(folders, dtype, device, base)
    return LocalGuide(models, load_students(folders, models))
