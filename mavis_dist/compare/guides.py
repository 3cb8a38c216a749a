"""Value models as methods use them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mavis_dist.compare.method import Method, Training
from mavis_dist.decode.load_guide import read_card
from mavis_dist.evaluate.collect import stage_seconds
from mavis_dist.models.directory import fingerprint_model
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.store.shards import read_trees, shard_names
from mavis_dist.types import BASE_POLICY, UserError

TREES = ("rollouts i0", "labels i0")  # stages that make the base model's trees
TRAINING = ("rollouts ", "labels ", "train ", "gate ")  # how the names of all stages of training begin


def tree_tokens(store: Store, policy: str) -> int:
    """Tokens in the trees of a policy; 0 if there are none."""
    folder = f"{layout.ROLLOUTS}/{policy}"
    if store.metadata(folder) is None:
        return 0
    return sum(
        len(tree.tokens) for name in shard_names(store, folder) for tree in read_trees(store, f"{folder}/{name}")
    )


class ValueModels(Method):
    """A method with the value models of a finished run.

    Settings: `run`, another run of the same storage, base model and objectives; `distilled`, its distilled model
    instead of the published iterations.
    """

    defaults = MappingProxyType({"run": None, "distilled": False})

    @property
    def store(self) -> Store:
        config = self.workspace.config
        return Store(config.storage, self.settings["run"] or config.run)

    @property
    def is_distilled(self) -> bool:
        return bool(self.settings["distilled"])

    def check(self) -> None:
        found = values.served(self.store)
        for name in self.workspace.config.objectives:
            if name not in found:
                raise UserError(f"run {self.store.run!r} has no published value model of {name!r}: finish it first")
            if self.is_distilled and found[name].distilled is None:
                raise UserError(f"run {self.store.run!r} serves no distilled model of {name!r}: run jobs.distill first")

    def folders(self) -> dict[str, Path]:
        """objective -> local folder of its value model."""
        served = values.served(self.store)
        found = {name: served[name] for name in self.workspace.config.objectives}
        if self.is_distilled:
            return {name: values.fetch_folder(self.store, model.folder) for name, model in found.items()}
        return {name: values.fetch(self.store, name, model.iteration) for name, model in found.items()}

    def inputs(self) -> Mapping[str, Any]:
        folders = self.folders()
        fingerprints = {folder: fingerprint_model(folder) for folder in set(folders.values())}
        return {"value_models": {name: fingerprints[folder] for name, folder in folders.items()}}

    def training(self) -> Training:
        first = self.workspace.store  # whose trees of the base model another run may have copied
        seconds = {**stage_seconds(first, TREES), **stage_seconds(self.store, TRAINING)}
        tokens = {
            BASE_POLICY: tree_tokens(first, BASE_POLICY),
            **{policy: tree_tokens(self.store, policy) for policy in self.store.list(layout.ROLLOUTS)},
        }
        return Training(math.fsum(seconds.values()) + self._distilling_s(), sum(tokens.values()))

    def _distilling_s(self) -> float:
        """How long it took to distil the models that it steers with, and those that they extend."""
        if not self.is_distilled:
            return 0.0
        served, folders = values.served(self.store), set[str]()
        waiting = {served[name].folder for name in self.workspace.config.objectives}
        while waiting:
            folders |= waiting
            parents = {read_card(self.store, folder).parent for folder in waiting}
            waiting = {parent for parent in parents if parent is not None} - folders
        return math.fsum(stage_seconds(self.store, tuple(folders)).values())

    def equal_weights(self) -> dict[str, float]:
        """Of all objectives."""
        names = self.workspace.config.objectives
        return dict.fromkeys(names, 1 / len(names))
