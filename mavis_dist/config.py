"""One YAML file plus dotted overrides, checked once; every error names the key, its value and the remedy.

Knows nothing of torch, ray or files other than the YAML it is given, so that `--help` is instant.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticUndefined

from mavis_dist.types import NEUTRAL_SYSTEM, TILT_CAP, UserError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence for the user."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(Section):
    """The language model that is steered; it is never trained."""

    model: str = Field(
        "smollm2-135m-instruct", description="named default, Hugging Face hub id, local directory, or .gguf file"
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="precision of base and value models")
    device: str = Field("cpu", description="torch device of every model, such as cpu or cuda")
    system: str = Field(NEUTRAL_SYSTEM, description="neutral system sentence for prompts that bring none")


class Prompts(Section):
    """Where the questions come from."""

    source: str = Field("builtin", description="builtin, a .jsonl or .parquet file, or a Hugging Face data set id")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    field: str = Field("prompt", description="column that holds the question")
    train_split: str = Field("train", description="split that training prompts come from")
    eval_split: str = Field(
        "eval", description="split that unseen prompts come from; may equal train_split, rows never overlap"
    )
    train: Count = Field(96, description="number of prompts that trees grow on")
    validation: int = Field(8, ge=0, description="number of the training prompts held out to measure the value models")
    evaluation: Count = Field(32, description="number of unseen prompts in the evaluation sweep")

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Prompts:
        if self.validation >= self.train:
            raise ValueError(f"validation ({self.validation}) must be smaller than train ({self.train})")
        return self


class TextRule(Section):
    """A reward computed from the text alone."""

    reward: Literal["sentiment", "brevity"] = Field(
        description="sentiment (VADER compound, -1 to 1) or brevity (minus the number of words)"
    )


class Relevance(Section):
    """Cosine similarity of question and answer under a sentence embedding."""

    reward: Literal["relevance"] = Field(description="relevance (cosine similarity, -1 to 1)")
    model: str = Field("all-minilm-l6-v2", description="named default or local directory of the sentence embedder")


class Classifier(Section):
    """A Hugging Face sequence classifier read as a reward."""

    reward: Literal["classifier"] = Field(description="a Hugging Face sequence classifier")
    model: str = Field(description="hub id or local directory")
    label: int | str = Field(0, description="output that is the reward, by index or by name")
    template: str = Field("{answer}", description="text given to the classifier; {prompt} and {answer} are filled in")
    output: Literal["logit", "probability"] = Field("logit", description="raw output, or softmax over the labels")

    @field_validator("template")
    @classmethod
    def _has_answer(cls, template: str) -> str:
        if "{answer}" not in template:
            raise ValueError("the template must contain {answer}")
        return template


class Function(Section):
    """The user's own Python."""

    reward: Literal["function"] = Field(description="a Python function (prompts, answers) -> scores")
    path: str = Field(description="module:function", pattern=r"^[\w.]+:\w+$")


Objective = Annotated[TextRule | Relevance | Classifier | Function, Field(discriminator="reward")]


class TreeShape(Section):
    """Branching of one tree of rollouts (arXiv 2508.13415, tree-structured data collection)."""

    root: Count = Field(4, description="segments that start at the prompt")
    children: Count = Field(2, description="segments that start at every inner node")
    layers: Count = Field(5, description="number of segments from the prompt to a leaf")


class Rollout(Section):
    """How answers are sampled for training, and with how many machines."""

    first: TreeShape = Field(TreeShape(), description="trees of iteration 0, sampled from the base model")
    later: TreeShape = Field(TreeShape(root=2), description="trees of later iterations, sampled from the tilted policy")
    max_tokens: Count = Field(128, description="longest answer, in tokens (T_max)")
    top_k: Count = Field(40, description="candidates per step; with top_p and min_p this defines the reference policy")
    top_p: Fraction = Field(1.0, description="nucleus of the reference policy, a probability")
    min_p: float = Field(0.0, ge=0, lt=1, description="least probability relative to the most likely token")
    dynamic_split: bool = Field(True, description="give answers that finished in the first layer a second branching")
    actors: Count = Field(1, description="rollout actors, each with its own copy of the models")
    cpus_per_actor: NonNegative = Field(2, description="CPU cores per rollout actor")
    gpus_per_actor: NonNegative = Field(0, description="GPUs per rollout actor")
    rows: Count = Field(64, description="answers written at the same time by one actor")
    prompts_per_shard: Count = Field(16, description="trees per stored file, the unit of resuming")

    @model_validator(mode="after")
    def _every_layer_gets_a_token(self) -> Rollout:
        deepest = max(self.first.layers, self.later.layers)
        if self.max_tokens < deepest:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be at least the number of layers ({deepest})")
        return self


class Steer(Section):
    """The tilt of the base model's distribution."""

    beta: NonNegative = Field(8.0, description="strength: nats of tilt per standard deviation of reward")
    tilt_cap: Annotated[float, Field(gt=0)] | None = Field(
        TILT_CAP, description="upper bound of the tilt of one token, in nats; null: unbounded, as published"
    )


class Value(Section):
    """The small model that predicts one objective's reward from an unfinished answer."""

    backbone: str = Field("base", description="base: the first layers of the base model; else a hub id or directory")
    layers: Count | None = Field(8, description="layers kept of the backbone; none keeps all")
    lora_rank: int = Field(0, ge=0, description="rank of low-rank adapters; 0 trains the whole backbone")
    lora_alpha: Count = Field(256, description="scale of the low-rank adapters")
    lora_dropout: float = Field(0.2, ge=0, lt=1, description="dropout of the low-rank adapters, a probability")


class Train(Section):
    """DeepSpeed under Ray Train; one worker group per objective, all objectives at the same time."""

    epochs: Count = Field(3, description="passes over the training trees")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate of AdamW")
    weight_decay: NonNegative = Field(0.01, description="decoupled weight decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="part of the steps with a rising learning rate")
    trees_per_step: Count = Field(4, description="whole trees per optimiser step, over all workers")
    accumulation: Count = Field(1, description="forward passes that a worker's trees of a step are spread over")
    patience: Count | None = Field(None, description="epochs without a better validation before it stops; null: never")
    targets: Literal["token", "node"] = Field("token", description="targets at every token, or at segment ends only")
    split_backup: Literal["fresh", "paper"] = Field(
        "fresh", description="value of a cut: of its fresh children alone, or the finished answer among them (biased)"
    )
    depth_balance: bool = Field(True, description="give every layer of the trees the same total weight in the loss")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of training")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    offload: bool = Field(False, description="keep optimiser states in CPU memory; needs zero_stage 1 or more")
    workers: Count = Field(1, description="data-parallel workers per objective")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1, description="CPU cores per training worker")
    gpus_per_worker: NonNegative = Field(0, description="GPUs per training worker")

    @model_validator(mode="after")
    def _workers_share_the_trees(self) -> Train:
        if self.trees_per_step % (self.workers * self.accumulation):
            raise ValueError(
                f"trees_per_step ({self.trees_per_step}) must be a multiple of "
                f"workers ({self.workers}) times accumulation ({self.accumulation})"
            )
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs DeepSpeed's own optimiser states: set zero_stage to 1, 2 or 3")
        return self


class Gate(Section):
    """Whether an iteration takes the place of the one before it."""

    samples: Count = Field(4, description="answers per validation prompt that compare two iterations")
    margin: NonNegative = Field(0.05, description="loss of soft value, in sd, that the 95 % bound may still hold")


class Distill(Section):
    """One model for all objectives: a shared trunk with a head each, and a student that predicts candidates."""

    layers: Count | None = Field(
        None, description="first layers of the base model that the trunk starts from; null: the value models' average"
    )
    epochs: Count = Field(2, description="passes over the stored trees that train trunk and heads")
    extends: str | None = Field(
        None, description="name of a distilled model that gets heads for further objectives, itself left as it is"
    )
    publish: bool = Field(True, description="serve the distilled model; false: each objective's own value model")


class Evaluate(Section):
    """Answers to unseen prompts over a grid of weights."""

    grid: Annotated[int, Field(ge=2)] = Field(3, description="weights per pair of objectives, corners included")
    samples: Count = Field(1, description="answers per prompt and weight")


class Range(Section):
    """As many as the load asks for, between two numbers."""

    min: Count
    max: Count

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


def _tag(replicas: Any) -> str:
    return "a range" if isinstance(replicas, (dict, Range)) else "a number"


Replicas = Annotated[Annotated[Count, Tag("a number")] | Annotated[Range, Tag("a range")], Discriminator(_tag)]


def bounds(replicas: int | Range) -> Range:
    """Of a number: itself, twice."""
    return replicas if isinstance(replicas, Range) else Range(min=replicas, max=replicas)


class Serve(Section):
    """The HTTP endpoint."""

    host: str = Field("127.0.0.1", description="address that the endpoint listens on")
    port: int = Field(8000, ge=1, le=65535, description="port that the endpoint listens on")
    placement: Literal["colocated", "replicas"] = Field(
        "replicas", description="value models inside the base replicas, or in replicas of their own"
    )
    base_replicas: Replicas = Field(
        1, description="replicas of the base model, or {min: 1, max: 4}: as many as the load asks for"
    )
    value_replicas: Replicas = Field(1, description="replicas of each objective's value model, or a range of them")
    cpus_per_replica: NonNegative = Field(0.25, description="CPU cores reserved by every replica")
    gpus_per_replica: NonNegative = Field(0, description="GPUs reserved by every base and value replica")
    rows: Count = Field(16, description="rows of a base replica: one per answer, one more per sentence that steers it")
    max_tokens: Count = Field(512, description="longest answer a request may ask for, in tokens")


class Config(Section):
    """Everything a run depends on."""

    run: str = Field(description="name of the run: a folder below storage", pattern=r"^[A-Za-z0-9][\w.-]*$")
    storage: str = Field("runs", description="shared folder or fsspec URI (file, s3, gs, hdfs) for all results")
    seed: int = Field(0, ge=0, description="seed of prompts, trees and training")
    iterations: Count = Field(2, description="rounds of rollouts and training, the one on the base model included")
    objectives: dict[str, Objective] = Field(description="what to steer towards: name -> reward", min_length=1)
    base: Base = Field(Base(), description="the language model")
    prompts: Prompts = Field(Prompts(), description="the questions")
    rollout: Rollout = Field(Rollout(), description="trees of answers")
    steer: Steer = Field(Steer(), description="the tilt")
    value: Value = Field(Value(), description="the value models")
    train: Train = Field(Train(), description="their training")
    gate: Gate = Field(Gate(), description="which iterations are published")
    distill: Distill = Field(Distill(), description="one model for all objectives")
    evaluate: Evaluate = Field(Evaluate(), description="the sweep over weights")
    serve: Serve = Field(Serve(), description="the HTTP endpoint")

    @field_validator("objectives")
    @classmethod
    def _names_are_folders(cls, objectives: dict[str, Any]) -> dict[str, Any]:
        for name in objectives:
            if not name.replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"the name {name!r} must consist of letters, digits and underscores")
        return objectives


# Keys that change where or how fast something runs but not what it produces.
FREE_KEYS = frozenset(
    {
        "storage",
        "iterations",
        "base.device",
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
    config = parse(raw)
    if "://" in config.storage:
        return config
    return config.model_copy(update={"storage": str(Path(config.storage).resolve())})  # workers live elsewhere


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

    Objectives may be added; FREE_KEYS, `distill`, `evaluate` and `serve` may change.
    """
    before, after = flatten(old), flatten(new)
    free_sections = ("distill.", "evaluate.", "serve.")
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
    """(dotted key, type, default, meaning) of every setting; `defaults` are those of the section that holds it."""
    for name, field in model.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.", default)
            continue
        yield f"{prefix}{name}", _type_name(model, name), default, field.description
        if name == "objectives":
            for kind in typing.get_args(typing.get_args(Objective)[0]):
                yield from _settings(kind, "objectives.NAME.")


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
        return "none" if kind is type(None) else kind.__name__

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
    # An unknown key first: it often is the reason for a missing one.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    kinds = {"sentiment", "brevity", "relevance", "classifier", "function", "a number", "a range"}
    key = ".".join(str(part) for part in first["loc"] if part not in kinds)
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


def _known_keys() -> list[str]:
    return [key for key, *_ in _settings(Config)]


def _leaves(node: Any, prefix: str) -> typing.Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node
