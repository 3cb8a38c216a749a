"""One YAML file plus dotted overrides, checked once; every error names the key, its value and the remedy.

Paths are expanded and made absolute here (mavis_dist.paths): actors and workers have other working directories. Loads
neither torch nor ray, and reads no other file, so that `--help` is instant.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined

from mavis_dist.sections import (
    OF_BASE,
    Base,
    Compare,
    Count,
    Distill,
    Evaluate,
    Folder,
    Gate,
    Objective,
    Prompts,
    Rollout,
    Section,
    Serve,
    Steer,
    Train,
    Value,
)
from mavis_dist.types import UserError


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence for the user."""


class Config(Section):
    """Everything a run depends on."""

    run: str = Field(description="name of the run: a folder below storage", pattern=r"^[A-Za-z0-9][\w.-]*$")
    storage: Folder = Field(
        "runs",
        validate_default=True,
        description="shared folder or fsspec URI (file, s3, gs, hdfs) for all results; must be absolute in a Ray job",
    )
    seed: int = Field(0, ge=0, description="seed of prompts, trees and training")
    iterations: Count = Field(1, description="rounds of rollouts and training, including the one on the base model")
    objectives: dict[str, Objective] = Field(description="what to steer towards: name -> reward", min_length=1)
    base: Base = Field(Base(), description="the language model")
    prompts: Prompts = Field(Prompts(), description="training and evaluation prompts")
    rollout: Rollout = Field(Rollout(), description="trees of sampled answers")
    steer: Steer = Field(Steer(), description="the tilt of the base model")
    value: Value = Field(Value(), description="the value models")
    train: Train = Field(Train(), description="training of the value models")
    gate: Gate = Field(Gate(), description="whether a new iteration replaces the current one")
    distill: Distill = Field(Distill(), description="one model for all objectives")
    evaluate: Evaluate = Field(Evaluate(), description="the sweep over weights")
    compare: Compare = Field(Compare(), description="methods of steering side by side")
    serve: Serve = Field(Serve(), description="the HTTP endpoint")

    @property
    def backbone(self) -> str:
        """The model whose first layers value models begin as."""
        return self.base.model if self.value.backbone == OF_BASE else self.value.backbone

    @field_validator("objectives")
    @classmethod
    def _names_are_folders(cls, objectives: dict[str, Any]) -> dict[str, Any]:
        for name in objectives:
            if not name.replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"the name {name!r} must consist of letters, digits and underscores")
        return objectives

    @model_validator(mode="after")
    def _states_of_one_process(self) -> Config:
        size = self.base.tensor_parallel
        if self.value.kind == "states" and size > 1:
            raise ValueError(
                f"value.kind='states' reads the base model's states in one process, and base.tensor_parallel={size} "
                "shares them out: use value.kind=model or shared"
            )
        return self

    @model_validator(mode="after")
    def _vllm_in_one_process(self) -> Config:
        if self.base.engine == "vllm":
            if self.base.tensor_parallel > 1:
                raise ValueError(
                    f"base.engine=vllm computes the base model in one process, and base.tensor_parallel="
                    f"{self.base.tensor_parallel} shares it out: use base.tensor_parallel=1, or base.engine=builtin"
                )
            if self.value.kind == "states":
                raise ValueError(
                    "value.kind='states' reads the base model's states, which base.engine=vllm does not give: use "
                    "value.kind=model or shared"
                )
        return self

    @property
    def learns_prefixes(self) -> bool:
        """Whether value models are trained to predict rewards of unfinished answers as well."""
        return self.train.targets == "prefix" and self.value.kind != "states"


# Keys that change where or how fast something runs but not what it produces.
FREE_KEYS = frozenset(
    {
        "storage",
        "iterations",
        "base.device",
        "base.engine",
        "base.tensor_parallel",
        "rollout.actors",
        "rollout.cpus_per_actor",
        "rollout.gpus_per_actor",
        "rollout.rows",
        "train.cpus_per_worker",
        "train.gpus_per_worker",
        "train.offload",
        "train.workers",
        "train.zero_stage",
    }
)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides (values in YAML), and check the result.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist: give --config an existing YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {str(path)!r} holds {type(raw).__name__}, not a mapping of keys to values")
    for override in overrides:
        _apply(raw, override)
    return parse(raw)


def parse(raw: dict[str, Any]) -> Config:
    """Check a nested mapping; raises ConfigError."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by dotted key, as plain values."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def conflicts(old: Config, new: Config) -> list[str]:
    """One sentence per key whose change would mix results of two different runs in one folder.

    Objectives may be added; FREE_KEYS, `distill`, `evaluate`, `compare` and `serve` may change.
    """
    before, after = flatten(old), flatten(new)
    free_sections = ("distill.", "evaluate.", "compare.", "serve.")
    return [
        f"config key {key!r} is {after.get(key)!r} but this run was started with {before[key]!r}: "
        f"change it back, or choose another name with run=NAME"
        for key in before
        if key not in FREE_KEYS and not key.startswith(free_sections) and before[key] != after.get(key)
    ]


def describe() -> str:
    """All keys with meaning and default, for --help."""
    lines: list[str] = []
    for key, kind, default, description in _settings(Config):
        shown = "required" if default is PydanticUndefined else f"default {default!r}"
        lines.append(f"  {key} ({kind}, {shown})\n      {description}")
    return "\n".join(lines)


def _settings(
    model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None
) -> typing.Iterator[tuple[str, str, Any, str | None]]:
    """(dotted key, type, default, meaning) of every setting; `defaults` holds the defaults of a nested section."""
    for name, field in model.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        section = _section(field.annotation)
        if section is not field.annotation:
            yield f"{prefix}{name}", _type_name(model, name), default, field.description
        if section is not None:
            yield from _settings(section, f"{prefix}{name}.", default)
        if name == "objectives":
            for kind in typing.get_args(typing.get_args(Objective)[0]):
                yield from _settings(kind, "objectives.NAME.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may hold."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _type_name(model: type[BaseModel], name: str) -> str:
    def render(kind: Any) -> str:
        origin = typing.get_origin(kind)
        if origin is Annotated:
            return render(typing.get_args(kind)[0])
        if origin is Literal:
            return " | ".join(str(value) for value in typing.get_args(kind))
        if origin in (types.UnionType, typing.Union):
            return " | ".join(render(part) for part in typing.get_args(kind))
        if origin is dict:
            return "mapping"
        if origin is tuple:
            return "list"
        if kind is type(None):
            return "none"
        return "section" if issubclass(kind, BaseModel) else kind.__name__

    return render(typing.get_type_hints(model)[name])


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form dotted.key=value")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r} goes below {part!r}, which is a value and not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r} has a value that is not YAML") from None


def _sentence(error: ValidationError) -> str:
    details = error.errors()
    # An unknown key first: it often explains a missing one.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    key = ".".join(_key_of(first["loc"]))
    value = first["input"]
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, _known_keys(), n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "remove it; --help lists all keys"
        return f"unknown config key {key!r} (value {value!r}): {remedy}"
    if first["type"] == "missing":
        return f"config key {key!r} is missing: add it to the config file or give {key}=VALUE"
    problem = first["msg"].removeprefix("Value error, ")
    where = f"config key {key!r}" if key else "the config"
    shown = "" if isinstance(value, dict) or len(repr(value)) > 200 else f" is {value!r}"
    return f"{where}{shown}: {problem[0].lower()}{problem[1:]}"


def _key_of(location: Sequence[str | int]) -> list[str]:
    """The parts of a key; pydantic adds which of several kinds of value was taken."""
    parts = [str(part) for part in location if part not in ("a number", "a range")]
    return [*parts[:2], *parts[3:]] if parts[:1] == ["objectives"] else parts


def _known_keys() -> list[str]:
    return [key for key, *_ in _settings(Config)]


def _leaves(node: Any, prefix: str) -> typing.Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node
