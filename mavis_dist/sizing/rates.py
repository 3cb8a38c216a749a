"""Seconds of a decoding step and of a training step, from what the device reads and multiplies; or as measured.

A decoding step takes as long as it takes to read every weight once, to read the keys and values of its rows, and to
multiply every weight once per row, and 0.1 ms per layer on a GPU. The constants were chosen on the figures of one H100
(docs/figures/device.json), so how well they fit there says little about other GPUs: steps of 7 billion parameters with
1 to 256 rows are within 10 %, of 1 billion within 16 % up to 64 rows and 38 % too short with 256. Value models take
`GUIDE_FACTOR` times their reads and products, within a factor of 1.5 beside the larger model, 2.4 beside the smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mavis_dist.config import Config
from mavis_dist.sizing.machines import CORE, Chip, Machines
from mavis_dist.sizing.memory import WIDTHS, Models, num_value_models
from mavis_dist.sizing.sizes import Size
from mavis_dist.sizing.workload import Decoding, Lengths, Training

GUIDE_FACTOR = 3.0
ALL_REDUCE_S = 2e-5  # of a group, twice in a layer; an estimate
NETWORK_BYTES_PER_S = 10e9  # between machines; an estimate
STORAGE_BYTES_PER_S = 1e9  # of an actor that loads weights; an estimate
PROCESS_START_S = 30.0  # of an actor, beside its weights; an estimate
TRAIN_START_S = 60.0  # of all workers of a fit; an estimate
LABEL_START_S = 10.0  # of a label task, with the model behind its reward; an estimate
TRAIN_FLOPS, FORWARD_FLOPS = 6, 2  # per parameter and token
# Answers of about 30 words per second that a task of one core scores. The first three were measured on a core of an
# AMD EPYC; the others are estimates, which depend on the model behind the reward.
ANSWERS_PER_S = {"sentiment": 7000.0, "brevity": 500_000.0, "relevance": 35.0, "classifier": 1.0, "judge": 2.0}
ANSWERS_PER_S_OF_FUNCTION = 1000.0


@dataclass(frozen=True)
class Rates:
    """What may be measured, and then replaces estimates; None: estimated."""

    tokens_per_s: float | None = None  # of a rollout actor without value models
    guided_tokens_per_s: float | None = None  # with them
    step_s: float | None = None  # of training
    answers_per_s: float | None = None  # that a label task scores
    actor_start_s: float | None = None
    train_start_s: float | None = None
    label_start_s: float | None = None


def engine_of(config: Config, machines: Machines, cpus: float, gpus: float) -> Chip:
    """What one process computes with: a GPU or its part of one, or its cores."""
    if config.base.device.startswith("cuda") and machines.gpu is not None:
        share = min(1.0, gpus or 1.0)
        return replace(machines.gpu, tflops=machines.gpu.tflops * share, gb_per_s=machines.gpu.gb_per_s * share)
    cores = max(1.0, cpus)
    return replace(CORE, tflops=CORE.tflops * cores, gb_per_s=CORE.gb_per_s * cores)


def step_s(chip: Chip, size: Size, rows: float, visible: float, width: int, num_shards: int = 1) -> float:
    """Seconds of a step in which each of `rows` gets a token and sees `visible` tokens; `width` in bytes."""
    read = width * size.num_multiplied + rows * visible * size.token_bytes(width)
    flops = 2 * rows * size.num_multiplied
    computed = (read / chip.read_bytes_per_s + flops / chip.flops_per_s) / num_shards
    exchanged = 2 * ALL_REDUCE_S * size.layers if num_shards > 1 else 0.0
    return computed + size.layers * chip.layer_s + exchanged


def guide_s(chip: Chip, size: Size, rows: float, candidates: float, width: int) -> float:
    """Seconds in which a value model evaluates the candidates of a step."""
    read = width * size.layers * size.matrices
    flops = 2 * rows * candidates * size.layers * size.matrices
    return GUIDE_FACTOR * (read / chip.read_bytes_per_s + flops / chip.flops_per_s)


def tokens_per_s(
    config: Config, models: Models | None, machines: Machines, rates: Rates, stage: Decoding, lengths: Lengths
) -> float:
    """Of one rollout actor in a stage."""
    measured = rates.guided_tokens_per_s if stage.is_guided else rates.tokens_per_s
    if measured is not None:
        return measured
    assert models is not None
    rows = min(config.rollout.rows, stage.rows)
    return rows / decoding_s(config, models, machines, stage, lengths, rows)


def decoding_s(
    config: Config, models: Models, machines: Machines, stage: Decoding, lengths: Lengths, rows: float
) -> float:
    """Seconds of a step of an actor, with its value models."""
    rollout, width = config.rollout, WIDTHS[config.base.dtype]
    chip = engine_of(config, machines, rollout.cpus_per_actor, rollout.gpus_per_actor)
    visible = lengths.prompt + (lengths.answer or rollout.max_tokens) / 2
    seconds = step_s(chip, models.base, rows, visible, width, config.base.tensor_parallel)
    if stage.is_guided and models.value is not None:
        # Trees follow one objective, answers of the sweep most often two or more.
        num = 1 if stage.stage.startswith("rollouts") else num_value_models(config)
        seconds += num * guide_s(chip, models.value, rows, stage.candidates, width)
    return seconds


def actor_start_s(config: Config, models: Models | None, rates: Rates) -> float:
    """Seconds until an actor has loaded its models."""
    if rates.actor_start_s is not None:
        return rates.actor_start_s
    assert models is not None
    weights = models.base.weight_bytes(WIDTHS[config.base.dtype], config.base.tensor_parallel)
    return PROCESS_START_S + weights / STORAGE_BYTES_PER_S


def train_step_s(config: Config, models: Models | None, machines: Machines, rates: Rates, stage: Training) -> float:
    """Seconds of an optimiser step: 6 operations per parameter and token, and the exchange of gradients in float32.

    Heads on the base model's states take a forward pass through two thirds of its layers in place of it.
    """
    if rates.step_s is not None:
        return rates.step_s
    assert models is not None
    train = config.train
    chip = engine_of(config, machines, train.cpus_per_worker, train.gpus_per_worker)
    tokens, flops_per_s = stage.tokens / train.workers, chip.tflops * 1e12 * chip.train_fraction
    if models.value is None:
        from mavis_dist.models.states import default_layer  # here: a simulation with given rates needs no torch

        layers = config.value.layers or default_layer(models.base.layers)
        return tokens * FORWARD_FLOPS * layers * models.base.matrices / flops_per_s
    parameters = models.value.layers * models.value.matrices
    exchanged = 2 * 4 * parameters * (train.workers - 1) / train.workers / NETWORK_BYTES_PER_S
    return tokens * TRAIN_FLOPS * parameters / flops_per_s + exchanged


def label_start_s(rates: Rates) -> float:
    """Seconds until a label task scores its first answer."""
    return LABEL_START_S if rates.label_start_s is None else rates.label_start_s


def answers_per_s(config: Config, objective: str, rates: Rates) -> float:
    """That a label task of one objective scores."""
    kind = config.objectives[objective].reward
    return rates.answers_per_s or ANSWERS_PER_S.get(kind, ANSWERS_PER_S_OF_FUNCTION)
