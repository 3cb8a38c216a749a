"""Variants of the training of iteration 0, each a separate run.

A variant learns from copies of the reference's labelled trees, unless it changes what trees are sampled: then it
samples its own. Built-in evaluation prompts come from a split of their own in file order, so they are the same
whatever `prompts.train` is; all variants answer those of the reference. The held-out prompts are the last of the
training prompts: they are others where `prompts.train` or `prompts.validation` differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.prompts import load_prompts
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.types import Policy, UserError

TREE_SECTIONS = ("prompts.", "rollout.")  # settings that change which trees are sampled


@dataclass(frozen=True)
class Variant:
    """A name and changed settings of the training, by dotted key."""

    name: str
    settings: Mapping[str, Any]  # a value, or a mapping of the keys of a section

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {_text(value)}" for key, value in self.settings.items())

    def config(self, study: Config) -> Config:
        """The config of the variant's run: these settings changed, in the same storage, iteration 0 only.

        Raises:
            ConfigError: the settings do not fit the study's.
        """
        raw = study.model_dump(mode="json")
        for key, value in self.settings.items():
            *sections, last = key.split(".")
            node = raw
            for section in sections:
                node = node[section]
            node[last] = value
        return config_module.parse({**raw, "run": f"{study.run}-{self.name}", "iterations": 1})

    def changed(self, study: Config) -> set[str]:
        """The dotted keys whose values differ from the study's."""
        ours, theirs = config_module.flatten(self.config(study)), config_module.flatten(study)
        return {key for key in ours if ours[key] != theirs.get(key)} - {"run", "iterations"}

    def has_own_trees(self, study: Config) -> bool:
        return any(key.startswith(TREE_SECTIONS) for key in self.changed(study))


VARIANTS = (
    Variant("separate", {"value.kind": "model"}),
    Variant("no-sibling-term", {"train.sibling_weight": 0}),
    Variant("one-epoch", {"train.epochs": 1}),
    Variant("no-prefix-rewards", {"train.targets": "token"}),
    Variant("node-targets", {"train.targets": "node"}),
    Variant("low-rate", {"train.learning_rate": 1e-4}),
    Variant("4-layers", {"value.layers": 4}),
    Variant("8-layers", {"value.layers": 8}),
    Variant("states", {"value.kind": "states", "value.layers": None}),
    Variant("small-trees", {"rollout.first": {"root": 2, "children": 2, "layers": 2}}),
    # About as many sampled tokens as 1,080 prompts with trees 8/2/2 have.
    Variant(
        "large-trees",
        {
            "prompts.train": 680,
            "prompts.validation": 80,
            "rollout.first": {"root": 8, "children": 2, "layers": 3},
        },
    ),
)


def chosen(names: Sequence[str] | None) -> list[Variant]:
    """The variants of these names, None: all; raises UserError for a name that none has."""
    known = {variant.name: variant for variant in VARIANTS}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise UserError(f"--variants: there is no {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    return [variant for variant in VARIANTS if names is None or variant.name in names]


def train(study: Config, variant: Variant) -> None:
    """Train the variant's value models of all objectives; needs a connected cluster.

    Raises:
        Stopped: after SIGTERM or SIGINT; finished work is saved.
    """
    from mavis_dist import cluster, pipeline

    config = variant.config(study)
    check_unseen(study, config)
    state = pipeline.open_run(config)  # first: a run with results and without its config is refused
    try:
        with cluster.stop_on_signals():
            if variant.has_own_trees(study):
                pipeline.grow(state, 0, pipeline.policies_of(config, 0))
                pipeline.label(state, 0, pipeline.policies_of(config, 0))
            else:
                copy_trees(study, config)
            pipeline.fit(state, 0)
    finally:
        state.release_workers()


def check_unseen(study: Config, variant: Config) -> None:
    """Raises UserError if the variant would train on prompts that the study evaluates with."""
    training, _ = load_prompts(variant.prompts, variant.seed)
    _, evaluation = load_prompts(study.prompts, study.seed)
    seen = {prompt.text for prompt in training} & {prompt.text for prompt in evaluation}
    if seen:
        raise UserError(
            f"prompts.train={variant.prompts.train} of {variant.run!r} contains {len(seen)} of the evaluation prompts "
            f"of {study.run!r}: use a source with a split for evaluation"
        )


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


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(map(str, value.values()))
    return "null" if value is None else str(value)
