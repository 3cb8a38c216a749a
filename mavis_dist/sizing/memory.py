"""Memory of every process of a run and of a service, and which config key to change where it does not fit.

All of it is arithmetic. It is compared with the peaks of decoding and training that were measured on one H100
(docs/figures/device.json), where the part `largest pass` was added to meet them; no other GPU was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from mavis_dist.config import Config
from mavis_dist.plan import Node
from mavis_dist.sections import Train, bounds
from mavis_dist.sizing.machines import GIB, Machines
from mavis_dist.sizing.sizes import Size
from mavis_dist.sizing.workload import Lengths, tree_tokens

WIDTHS = {"float32": 4, "bfloat16": 2}
RUNTIME = GIB  # of a process: libraries, and on a GPU its context; an estimate
USABLE = 0.95  # of a memory: the rest is lost to fragments
LOGIT_COPIES = 3  # of a step's logits in float32: as computed, sorted out, and for the noise
PREFILL_TOKENS = {"cpu": 128, "cuda": 2048}  # of new prompts per step
BUCKET = 500_000_000  # elements that ZeRO 1 and 2 gather gradients in, DeepSpeed's default
TREE_PART = 512  # tokens of the parts that training splits a longer tree into
ADAM = 2  # moments per parameter


@dataclass(frozen=True)
class Models:
    """What is decoded and trained."""

    base: Size
    value: Size | None  # of one value model; None: heads on the base model's states

    def is_value_shared(self, size: int) -> bool:
        """Whether the processes of a group of this size share value models out, too."""
        return self.value is not None and self.value.num_parameters * size > self.base.backbone().num_parameters


@dataclass(frozen=True)
class Need:
    """What one process holds, in bytes by part."""

    process: str
    count: int  # of such processes
    on_device: Mapping[str, float]  # in the GPU's memory, or the machine's where `base.device` is cpu
    on_host: float = 0.0  # in the machine's memory beside a GPU
    has_model: bool = True

    @property
    def total(self) -> float:
        return sum(self.on_device.values())


@dataclass(frozen=True)
class Fit:
    """A process and the room for it."""

    need: Need
    room: float  # bytes for one such process, beside the others of its kind
    host_room: float = inf
    remedy: str | None = None  # one line, if it does not fit

    @property
    def fits(self) -> bool:
        return self.need.total <= self.room and self.need.on_host <= self.host_room


def num_value_models(config: Config) -> int:
    """Value models with a backbone of their own that the last stage of a run needs side by side."""
    if config.value.kind == "states":
        return 0
    return 1 if config.value.is_joint and config.iterations == 1 else len(config.objectives)


def decoding(
    config: Config,
    models: Models,
    rows: int,
    tokens: int,
    candidates: int,
    num_values: int,
    is_leader: bool = True,
    new_tokens: int | None = None,
) -> dict[str, float]:
    """Bytes of a process that decodes, by part; `tokens` of all rows.

    Weights: width of `base.dtype` x parameters, of a group's matrices 1 / `base.tensor_parallel`. Keys and values:
    tokens x 2 x layers x channels of the keys x width, shared by heads. The leader of a group also holds the logits,
    and the value models, with the same tokens and the cells of a step's candidates; those that are larger than a
    process's share of the base model are shared out like it. The largest pass, over so many new tokens of
    prompts (None: as many as the engine takes at a time) or the candidates of all rows, takes what one layer of
    `activation_bytes` does.
    """
    width, size = WIDTHS[config.base.dtype], config.base.tensor_parallel
    if new_tokens is None:
        new_tokens = PREFILL_TOKENS["cuda" if config.base.device.startswith("cuda") else "cpu"]
    largest = max(new_tokens, rows * (candidates if is_leader and models.value else 1))
    parts = {
        "weights": models.base.weight_bytes(width, size),
        "keys and values": tokens * models.base.token_bytes(width, size),
        "largest pass": activation_bytes(replace(models.base, layers=1), largest, config.base.dtype),
    }
    if is_leader:
        parts["logits"] = LOGIT_COPIES * 4 * rows * models.base.vocabulary
    if models.value is not None and (is_leader or models.is_value_shared(size)):
        shards = size if models.is_value_shared(size) else 1
        cells = (tokens + rows * candidates) * models.value.token_bytes(width, shards)
        parts["value models"] = num_values * (models.value.weight_bytes(width, shards) + cells)
    return {**parts, "runtime": RUNTIME}


def activation_bytes(size: Size, num_tokens: float, dtype: str) -> float:
    """What a pass keeps for its gradients.

    Per token and layer, in bytes, with h channels and i in the middle of the feed-forward part: 38 h + 8 i in bfloat16
    under autocast (residuals and norms 16 h in float32; inputs of the five products 10 h, rotated queries and keys and
    what attention returns 12 h, and four tensors of the feed-forward part 8 i in bfloat16), 60 h + 16 i in float32.
    Attention keeps no scores, and its mask of one byte per pair of tokens is left out: parts have at most about 512.
    All trees of a pass count, as their graphs live until its one backward call.
    """
    h, i = size.hidden, size.inner
    per_token = 38 * h + 8 * i if dtype == "bfloat16" else 60 * h + 16 * i
    return num_tokens * size.layers * per_token


def training(size: Size, train: Train, lora_rank: int, num_tokens: float) -> tuple[dict[str, float], float]:
    """Bytes of a training worker by part, and beside them in the machine's memory; `num_tokens` of one pass.

    Parameters are in float32 (4 bytes) whatever `train.dtype` is, and so are gradients (4) and both moments of AdamW
    (8): 16 bytes of each that is trained, 4 of a frozen one (token embeddings; with adapters the whole backbone).
    ZeRO 1 and 2 train a second copy of the parameters (4), of which a worker holds its part, like of the moments; so
    it does of the gradients under ZeRO 2, which both gather in a bucket of 500 million elements. ZeRO 3 shares out
    everything, needs no second copy, and has one layer whole at a time. bfloat16 adds a copy of the matrices in use
    (2). With `train.offload` moments, copy and gradients of a worker are in the machine's memory.
    """
    trained = lora_rank * size.layers * size.inputs_outputs if lora_rank else size.num_parameters - size.embedding
    frozen = size.num_parameters if lora_rank else size.embedding
    stage, workers = train.zero_stage, train.workers
    part = workers if stage else 1
    parameters, gradients, states = 4 * (trained + frozen), 4 * trained, 4 * ADAM * trained / part
    if stage in (1, 2):
        states += 4 * trained / part
    if stage >= 2:
        gradients /= part
    if stage == 3:
        parameters = parameters / part + 4 * size.matrices
    parts = {"parameters": parameters, "gradients": gradients, "optimiser": states}
    if stage in (1, 2):
        parts["bucket"] = 4.0 * min(BUCKET, trained)
    if train.dtype == "bfloat16":
        parts["bfloat16 copies"] = 2 * size.matrices * (1 if stage == 3 else size.layers)
    parts["activations"] = activation_bytes(size, num_tokens, train.dtype)
    parts["runtime"] = RUNTIME
    on_host = 4.0 * trained  # the best epoch's parameters, on one worker
    if train.offload:
        on_host += parts.pop("optimiser") + 4 * trained / part
    return parts, on_host


def pass_tokens(config: Config, lengths: Lengths) -> float:
    """Tokens that a worker computes in one pass: a long tree in parts that repeat the prompt."""
    train = config.train
    trees = train.trees_per_step / (train.workers * train.accumulation)
    answers = tree_tokens(config.rollout.first, config.rollout.max_tokens, lengths)
    parts = max(1.0, answers / max(1, TREE_PART - lengths.prompt))
    return trees * (answers + min(parts, config.rollout.first.root) * lengths.prompt)


def needs(config: Config, models: Models, lengths: Lengths) -> Iterator[Need]:
    """Of all kinds of processes."""
    yield from _rollout_needs(config, models, lengths)
    if models.value is not None:
        num_fits = 1 if num_value_models(config) == 1 else len(config.objectives)
        parts, on_host = training(models.value, config.train, config.value.lora_rank, pass_tokens(config, lengths))
        if not config.base.device.startswith("cuda"):  # one memory holds both
            parts, on_host = {**parts, "copies": on_host}, 0.0
        yield Need("training worker", num_fits * config.train.workers, parts, on_host)
    else:  # it solves for heads on the states of the base model
        weights = models.base.weight_bytes(WIDTHS[config.base.dtype])
        yield Need("training worker", config.train.workers, {"weights": weights, "runtime": RUNTIME})
    yield from _serving_needs(config, models, lengths)


def _rollout_needs(config: Config, models: Models, lengths: Lengths) -> Iterator[Need]:
    rollout, size = config.rollout, config.base.tensor_parallel
    tokens = rollout.rows * (lengths.prompt + rollout.max_tokens)
    shared = (config, models, rollout.rows, tokens, rollout.top_k, num_value_models(config))
    yield Need("rollout actor", rollout.actors, decoding(*shared))
    if size > 1:
        yield Need("its follower", rollout.actors * (size - 1), decoding(*shared, is_leader=False))


def _serving_needs(config: Config, models: Models, lengths: Lengths) -> Iterator[Need]:
    serve, size = config.serve, config.base.tensor_parallel
    replicas = bounds(serve.base_replicas).min
    tokens = serve.cache_tokens or serve.rows * (lengths.prompt + serve.max_tokens)
    is_colocated = serve.placement == "colocated"
    num_values = num_value_models(config) if is_colocated else 0
    shared = (config, models, serve.rows, tokens, config.rollout.top_k, num_values)
    yield Need("base replica", replicas, decoding(*shared))
    if size > 1:
        yield Need("its follower (serve)", replicas * (size - 1), decoding(*shared, is_leader=False))
    if not is_colocated and models.value is not None:
        width, cells = WIDTHS[config.base.dtype], tokens + serve.rows * config.rollout.top_k
        parts = {
            "weights": models.value.weight_bytes(width),
            "keys and values": cells * models.value.token_bytes(width),
        }
        count = len(config.objectives) * bounds(serve.value_replicas).min
        yield Need("value replica", count, {**parts, "runtime": RUNTIME})
    yield Need("gateway", 1, {"runtime": RUNTIME}, has_model=False)


Change = tuple[str, Any]  # a dotted key of two parts, its value


def with_changes(config: Config, *changes: Change) -> Config:
    """The config with other values, unchecked."""
    for key, value in changes:
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def fits(config: Config, models: Models, lengths: Lengths, machines: Machines) -> list[Fit]:
    """Every kind of process, its room, and what to change if it does not fit."""
    found = []
    for need in needs(config, models, lengths):
        fit = Fit(need, *room(config, need, machines))
        if not fit.fits:
            fit = Fit(need, fit.room, fit.host_room, _remedy(config, models, lengths, machines, need.process))
        found.append(fit)
    return found


def room(config: Config, need: Need, machines: Machines) -> tuple[float, float]:
    """Bytes for one process on its device, and beside it on its machine, where machines hold as many as they can."""
    cpus, gpus = _reserved(config, need.process)
    slots = min(need.count, max(1, Node(machines.cpus, machines.gpus).slots(cpus, gpus)))
    host = USABLE * machines.memory_gib * GIB / slots
    if config.base.device.startswith("cuda") and machines.gpu is not None and need.has_model:
        return USABLE * machines.gpu.memory_gib * GIB * min(1.0, gpus or 1.0), host
    return host, inf


def _reserved(config: Config, process: str) -> tuple[float, float]:
    """Cores and GPUs of a process."""
    rollout, train, serve = config.rollout, config.train, config.serve
    if process in ("rollout actor", "its follower"):
        return rollout.cpus_per_actor, rollout.gpus_per_actor
    if process == "training worker":
        return train.cpus_per_worker, train.gpus_per_worker
    return serve.cpus_per_replica, 0 if process == "gateway" else serve.gpus_per_replica


def _remedy(config: Config, models: Models, lengths: Lengths, machines: Machines, process: str) -> str:
    """The first of the changes that could help which makes the process fit, as one line."""
    for changes in _candidates(config, models, process):
        changed = with_changes(config, *changes)
        need = next(need for need in needs(changed, models, lengths) if need.process == process)
        if Fit(need, *room(changed, need, machines)).fits:
            return "set " + " ".join(f"{key}={_yaml(value)}" for key, value in changes)
    return "no single change makes it fit: use machines with more memory, or a smaller model"


def _candidates(config: Config, models: Models, process: str) -> Iterator[tuple[Change, ...]]:
    if process == "training worker":
        yield from _training_candidates(config)
        return
    from mavis_dist.models.lockstep import group_sizes  # here: a simulation with given rates needs no torch

    key, rows = ("rollout.rows", config.rollout.rows)
    if process not in ("rollout actor", "its follower"):
        key, rows = ("serve.rows", config.serve.rows)
    yield from (((key, fewer),) for fewer in _halves(rows))
    yield from (
        (("base.tensor_parallel", n),) for n in group_sizes(models.base.key_heads) if n > config.base.tensor_parallel
    )


def _training_candidates(config: Config) -> Iterator[tuple[Change, ...]]:
    train = config.train
    each = train.trees_per_step // train.workers
    for more in (n for n in range(train.accumulation + 1, each + 1) if each % n == 0):
        yield (("train.accumulation", more),)
    passes: Change = ("train.accumulation", each)
    for stage in range(train.zero_stage + 1, 4):
        yield (("train.zero_stage", stage), passes)
    for workers in (2**n * train.workers for n in range(1, 6)):
        for offload in (False, True):
            steps: Change = ("train.trees_per_step", max(train.trees_per_step, workers))
            accumulation: Change = ("train.accumulation", max(1, int(steps[1]) // workers))
            change = (("train.zero_stage", 3), ("train.workers", workers), steps, accumulation)
            yield (*change, ("train.offload", True)) if offload else change


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _yaml(value: Any) -> str:
    return str(value).lower()
