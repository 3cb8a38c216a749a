"""Variants of the training of iteration 0, each a separate run that learns from the same labelled trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mavis_dist.config import Config
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.types import Policy


@dataclass(frozen=True)
class Variant:
    """One changed setting of the training."""

    name: str
    section: str
    key: str
    value: Any

    @property
    def label(self) -> str:
        return f"{self.section}.{self.key} {self.value}"

    def is_new(self, config: Config) -> bool:
        """Whether it differs from the run's own setting."""
        return getattr(getattr(config, self.section), self.key) != self.value

    def config(self, study: Config) -> Config:
        """The config of the variant's run: one setting changed, in the same storage, iteration 0 only."""
        section = getattr(study, self.section).model_copy(update={self.key: self.value})
        return study.model_copy(update={"run": f"{study.run}-{self.name}", "iterations": 1, self.section: section})


VARIANTS = (Variant("node", "train", "targets", "node"), Variant("8-layers", "value", "layers", 8))


def train(study: Config, variant: Variant) -> None:
    """Train the variant's value models of all objectives; needs a connected cluster."""
    from mavis_dist import pipeline

    config = variant.config(study)
    state = pipeline.open_run(config)  # first: a run with results and without its config is refused
    copy_trees(study, config)
    pipeline.fit(state, 0)


def copy_trees(source: Config, target: Config) -> None:
    """Copy the base model's trees with their labels to another run.

    Raises:
        StoreError: the source has not finished them.
    """
    folders = [rollout_folder(Policy()), *(label_folder(Policy(), name) for name in source.objectives)]
    for folder in folders:
        copy_stage(Store(source.storage, source.run), Store(target.storage, target.run), folder)


def copy_stage(source: Store, target: Store, folder: str) -> None:
    """Copy a finished stage unless it exists, the marker last; raises StoreError if the stage is not finished."""
    if target.metadata(folder) is not None:
        return
    metadata = source.metadata(folder)
    if metadata is None:
        raise StoreError(f"{source.root}/{folder} is not finished: run the pipeline of {source.run!r} first")
    for name in source.list(folder):
        if name != MARKER:
            target.write_bytes(f"{folder}/{name}", source.read_bytes(f"{folder}/{name}"))
    target.finish(folder, metadata)
