"""What is checked in a process of its own on every machine that works for a run. Loads neither torch nor Ray."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from mavis_dist import sections
from mavis_dist.config import Config
from mavis_dist.environment import versions
from mavis_dist.rewards.protocol import RewardError
from mavis_dist.rewards.trial import try_reward
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import UserError
from mavis_dist.vllm.versions import check_installed


def check_machine(config: Config, probe: str, driver_versions: Mapping[str, str]) -> None:
    """Raises UserError unless this machine has the packages and local models that the config needs, in the versions of
    the driver, can write to the run's storage, and finds the driver's file `probe` there.
    """
    check_packages(config)
    for name, own in versions().items():
        if own != driver_versions[name]:
            raise UserError(
                f"machine {platform.node()} has {name} {own}, and the driver's machine {driver_versions[name]}: "
                "install the same version on all machines"
            )
    store, here = Store(config.storage, config.run), platform.node()
    if not store.file_appears(probe):
        raise StoreError(
            f"storage {config.storage!r} is another folder on machine {here} than on the driver's: give a folder "
            "that all machines share, or a URI"
        )
    store.check_writable()
    for key, path in local_models(config):
        if not os.path.exists(path):
            raise UserError(
                f"config key {key!r} is {path!r}, which machine {here} does not have: put it on storage that all "
                "machines share"
            )


def check_rewards(config: Config, prompts: Sequence[str]) -> None:
    """Raises UserError unless this machine can call the functions and judges of the config, which may take long."""
    for name, objective in config.objectives.items():
        if isinstance(objective, (sections.Function, sections.Judge)):
            try:
                try_reward(name, objective, config.rollout.max_tokens, prompts)
            except UserError as error:
                raise RewardError(f"on machine {platform.node()}: {error}") from error


def check_packages(config: Config) -> None:
    """Raises UserError unless this machine has what this config imports."""
    if config.base.engine == "vllm":
        check_installed()
    needed = {"deepspeed": config.value.kind != "states", "peft": config.value.lora_rank > 0}
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
