"""Typed arguments of the Serve applications, as serve/config.yaml gives them. Knows nothing of Ray or torch.

They are a view of the config: the fields that they share with its sections are declared there.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mavis_dist.config import Config
from mavis_dist.sections import (
    Base,
    Count,
    MainSettings,
    NonNegative,
    Replicas,
    Scaling,
    Section,
    Serve,
    Steer,
    bounds,
)

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
NO_KEYS = "none"
MAIN = "main"  # the application of gateway and base
KEY_FILE = "keys.json"


def value_application(objective: str) -> str:
    """The application of an objective's value model."""
    return f"value-{objective}"


def authority(host: str, port: int) -> str:
    """Host and port as a URL has them: IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _like(section: type[Section], name: str) -> Any:
    """The declaration of a setting that the config has under another name, or in another section."""
    return copy(section.model_fields[name])


class Arguments(Scaling):
    """What both applications take."""

    storage: str = Field(
        str(ROOT / "runs"), description="folder or fsspec URI of all runs; a relative one is below this checkout"
    )
    run: str = Field(description="name of the run whose published value models are served")
    base: str = _like(Base, "model")
    dtype: Literal["float32", "bfloat16"] = _like(Base, "dtype")
    device: str = _like(Base, "device")
    cpus: NonNegative = _like(Serve, "cpus_per_replica")
    gpus: NonNegative = _like(Serve, "gpus_per_replica")
    replicas: Replicas = Field(
        1, description="a fixed count, or {min: 1, max: 4}: as many as keep the load of each at `target_load`"
    )

    @field_validator("storage")
    @classmethod
    def _found_from_anywhere(cls, storage: str) -> str:
        # Replicas run in working directories of their own.
        return storage if "://" in storage else str(ROOT / Path(storage).expanduser())


class MainArgs(Arguments, MainSettings, Steer):
    """Gateway and base. Objectives are not named: they come from the store."""

    system: str = _like(Base, "system")
    tensor_parallel: Count = _like(Base, "tensor_parallel")
    engine: Literal["builtin", "vllm"] = _like(Base, "engine")
    value_sessions: Count = Field(
        1,
        description="groups of a base replica's rows, each served by one value replica; jobs.serve sets value replicas "
        "per base replica, rounded up",
    )

    @property
    def model_name(self) -> str:
        """The base model's name in requests and answers."""
        return self.served_model_name or self.base

    @field_validator("keys")
    @classmethod
    def _below_the_checkout(cls, keys: str | None) -> str:
        # An application does not know its address: unless told otherwise, it requires keys.
        return NO_KEYS if keys == NO_KEYS else str(ROOT / Path(keys or KEY_FILE).expanduser())


class ValueArgs(Arguments):
    """The value model of one objective."""

    objective: str


def main_args(config: Config) -> MainArgs:
    serve = config.serve
    settings = _shared(serve, MainSettings)
    if serve.keys is None and serve.host in LOOPBACK:
        settings["keys"] = NO_KEYS
    return MainArgs(
        **_common(config),
        **settings,
        **_shared(config.steer, Steer),
        replicas=serve.base_replicas,
        system=config.base.system,
        tensor_parallel=config.base.tensor_parallel,
        engine=config.base.engine,
        value_sessions=-(-bounds(serve.value_replicas).max // bounds(serve.base_replicas).min),
    )


def value_args(config: Config, objective: str) -> ValueArgs:
    return ValueArgs(**_common(config), replicas=config.serve.value_replicas, objective=objective)


def _common(config: Config) -> dict[str, Any]:
    return {
        **_shared(config.serve, Scaling),
        "storage": config.storage,
        "run": config.run,
        "base": config.base.model,
        "dtype": config.base.dtype,
        "device": config.base.device,
        "cpus": config.serve.cpus_per_replica,
        "gpus": config.serve.gpus_per_replica,
    }


def _shared(settings: Section, view: type[Section]) -> dict[str, Any]:
    """The fields of a section that `view` has, too."""
    return {name: getattr(settings, name) for name in view.model_fields}
