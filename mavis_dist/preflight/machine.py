"""What is checked in a process of its own on every machine that works for a run. Loads neither torch nor Ray."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from mavis_dist import sections
from mavis_dist.config import Config
from mavis_dist.environment import versions
from mavis_dist.models.directory import fingerprint_model
from mavis_dist.rewards.protocol import RewardError
from mavis_dist.rewards.trial import try_reward
from mavis_dist.store import layout
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import UserError
from mavis_dist.vllm.versions import check_installed

MACHINE_CHECK_S = 120.0  # that a machine has for imports, storage and a look at files


def check_machine(
    config: Config,
    probe: str,
    driver_versions: Mapping[str, str],
    driver_models: Mapping[str, str],
    is_distilling: bool = False,
) -> None:
    """Raises UserError unless this machine has the packages and local models that the config needs, as the driver has
    them, can write to the run's storage, and finds the driver's file `probe` there.

    Args:
        driver_models: `local_fingerprints` of the driver.
    """
    check_packages(config, is_distilling)
    check_versions(driver_versions)
    store = Store(config.storage, config.run)
    check_storage(store, [probe])
    store.check_writable()
    check_local(local_models(config))
    own = local_fingerprints(config)
    for key, fingerprint in driver_models.items():
        if own[key] != fingerprint:
            raise UserError(
                f"the model of config key {key!r} is another one on machine {platform.node()} than on the driver's: "
                "put the same files on all machines"
            )


def check_server(config: Config, published: Sequence[str], driver_versions: Mapping[str, str]) -> None:
    """Raises UserError unless this machine can serve a run whose `published` objectives the driver has found."""
    check_versions(driver_versions)
    check_storage(Store(config.storage, config.run), map(layout.published_file, published))
    check_local([("base.model", config.base.model)])


def check_versions(driver_versions: Mapping[str, str]) -> None:
    for name, own in versions().items():
        if own != driver_versions[name]:
            raise UserError(
                f"machine {platform.node()} has {name} {own}, and the driver's machine {driver_versions[name]}: "
                "install the same version on all machines"
            )


def check_storage(store: Store, files: Iterable[str]) -> None:
    """Raises StoreError unless files that the driver sees are there."""
    if not all(map(store.file_appears, files)):
        raise StoreError(
            f"storage {store.storage!r} is another folder on machine {platform.node()} than on the driver's: give a "
            "folder that all machines share, or a URI"
        )


def check_local(models: Iterable[tuple[str, str]]) -> None:
    """Raises UserError for a model, given with its config key, that is a path which does not exist here."""
    for key, path in models:
        if os.path.isabs(path) and not os.path.exists(path):
            raise UserError(
                f"config key {key!r} is {path!r}, which machine {platform.node()} does not have: put it on storage "
                "that all machines share"
            )


def check_rewards(config: Config, prompts: Sequence[str]) -> None:
    """Raises UserError unless this machine can call the functions and judges of the config, which may take long."""
    for name, objective in config.objectives.items():
        if isinstance(objective, (sections.Function, sections.Judge)):
            try:
                try_reward(name, objective, config.rollout.max_tokens, prompts)
            except UserError as error:
                raise RewardError(f"on machine {platform.node()}: {error}") from error


def check_packages(config: Config, is_distilling: bool = False) -> None:
    """Raises UserError unless this machine has what this config imports, in a run or in a distillation."""
    if config.base.engine == "vllm":
        check_installed()
    needed = {"deepspeed": is_distilling or config.value.kind != "states", "peft": config.value.lora_rank > 0}
    for package, is_needed in needed.items():
        if is_needed and find_spec(package) is None:
            raise UserError(
                f"{package} is not installed on machine {platform.node()}: training needs more, pip install "
                "'mavis-dist[train]'"
            )


def local_models(config: Config) -> Iterator[tuple[str, str]]:
    """Key and absolute path of every model that is a file or folder."""
    named = {"base.model": config.base.model, "value.backbone": config.value.backbone}
    for name, objective in config.objectives.items():
        if isinstance(objective, (sections.Classifier, sections.Relevance)):
            named[f"objectives.{name}.model"] = objective.model
    yield from ((key, path) for key, path in named.items() if os.path.isabs(path))


def local_fingerprints(config: Config) -> dict[str, str]:
    """Of all models in folders, by config key, but the base model: whoever loads that one compares it."""
    folders = {key: path for key, path in local_models(config) if key != "base.model" and os.path.isdir(path)}
    return {key: fingerprint_model(Path(path)) for key, path in folders.items()}
