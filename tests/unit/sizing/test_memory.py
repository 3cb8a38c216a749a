"""Memory against numbers counted by hand, and against measured peaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mavis_dist.sections import Train
from mavis_dist.sizing.machines import GIB, parse_machines
from mavis_dist.sizing.memory import (
    BUCKET,
    RUNTIME,
    Models,
    activation_bytes,
    decoding,
    fits,
    needs,
    num_value_models,
    pass_tokens,
    training,
)
from mavis_dist.sizing.sizes import SHAPES, Size, read_size, shape_size, size_of
from mavis_dist.sizing.workload import Lengths
from mavis_dist.types import UserError
from tests.root import ROOT
from tests.unit.sizing.shapes import LAYER_7B, MODELS_7B, SIZE_7B, run_config, write_config

KIB = 2**10
MEASURED = json.loads((ROOT / "docs/figures/device.json").read_text())


def test_a_config_alone_tells_the_size_of_a_model(tmp_path: Path) -> None:
    assert read_size(str(write_config(tmp_path / "7b", "7b"))) == SIZE_7B
    assert SIZE_7B.num_parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("name", "parameters", "token_kib"), [("7b", 6.738e9, 512), ("13b", 13.016e9, 800), ("70b", 68.977e9, 320)]
)
def test_known_models_have_their_known_sizes(name: str, parameters: float, token_kib: int) -> None:
    size = shape_size(name)
    assert size.weight_bytes(2) == pytest.approx(2 * parameters, rel=1e-4)
    assert size.token_bytes(2) == token_kib * KIB


def test_a_tied_embedding_is_held_once_and_multiplied_with() -> None:
    from transformers import LlamaConfig

    tied = size_of(LlamaConfig(**SHAPES["1b"], tie_word_embeddings=True))
    separate = shape_size("1b")
    assert tied.num_parameters == separate.num_parameters - separate.head
    assert tied.num_multiplied == separate.num_multiplied


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_group_shares_out_matrices_keys_and_values(shards: int) -> None:
    everywhere = 2 * SIZE_7B.rest
    whole, part = SIZE_7B.weight_bytes(2), SIZE_7B.weight_bytes(2, shards)
    assert part - everywhere == pytest.approx((whole - everywhere) / shards)
    assert SIZE_7B.token_bytes(2, shards) == SIZE_7B.token_bytes(2) / shards


def test_a_backbone_is_the_first_layers_without_an_output() -> None:
    value = SIZE_7B.backbone(8)
    assert value.num_parameters == SIZE_7B.embedding + 8 * LAYER_7B + SIZE_7B.rest
    with pytest.raises(UserError, match=r"value\.layers is 33 .* 32 layers"):
        SIZE_7B.backbone(33)


def test_an_actor_holds_weights_keys_and_values_and_its_value_models() -> None:
    config = run_config(2, rollout={"rows": 16, "max_tokens": 28})
    parts = decoding(config, MODELS_7B, rows=16, tokens=16 * 128, candidates=40, num_values=2)
    assert parts["weights"] == 2 * 6_738_415_616
    assert parts["keys and values"] == 16 * 128 * 512 * KIB
    value = 2 * (32000 * 4096 + 8 * LAYER_7B + 65 * 4096) + 16 * 168 * 128 * KIB
    assert parts["value models"] == 2 * value
    follower = decoding(config, MODELS_7B, 16, 16 * 128, 40, 2, is_leader=False)
    assert set(parts) - set(follower) == {"logits", "value models"}


def test_a_cache_of_as_many_tokens_as_the_rows_have_changes_nothing() -> None:
    serve = {"rows": 16, "max_tokens": 112, "placement": "replicas"}
    tokens = 16 * (112 + Lengths().prompt)
    by_rows, by_tokens = (
        {need.process: need.total for need in needs(run_config(2, serve=settings), MODELS_7B, Lengths())}
        for settings in (serve, {**serve, "cache_tokens": tokens})
    )
    assert by_rows == by_tokens


def test_a_group_shares_out_value_models_that_are_larger_than_its_shares_of_the_base_model() -> None:
    quarter, half = (Models(SIZE_7B, SIZE_7B.backbone(layers)) for layers in (8, 16))
    assert not quarter.is_value_shared(1)
    assert not quarter.is_value_shared(3)
    assert half.is_value_shared(2)
    config = run_config(2, base={"tensor_parallel": 2})
    whole = decoding(run_config(2), half, rows=16, tokens=16 * 128, candidates=40, num_values=2)["value models"]
    for is_leader in (True, False):
        parts = decoding(config, half, 16, 16 * 128, 40, 2, is_leader)
        assert parts["value models"] == pytest.approx(whole / 2, rel=1e-3)
    assert "value models" not in decoding(config, quarter, 16, 16 * 128, 40, 2, is_leader=False)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "states"),
    [(0, 4, 4, 8), (1, 4, 4, (4 + 8) / 4), (2, 4, 4 / 4, (4 + 8) / 4), (3, 4 / 4, 4 / 4, 8 / 4)],
)
def test_zero_shares_out_more_with_every_stage(stage: int, parameters: float, gradients: float, states: float) -> None:
    """Bytes per trained parameter with 4 workers."""
    train = Train(zero_stage=stage, workers=4, trees_per_step=4)
    size = SIZE_7B.backbone(8)
    trained = 8 * LAYER_7B + SIZE_7B.rest
    parts, on_host = training(size, train, lora_rank=0, num_tokens=0)
    frozen = 4 * SIZE_7B.embedding / (4 if stage == 3 else 1)
    whole_layer = 4 * LAYER_7B if stage == 3 else 0
    assert parts["parameters"] == pytest.approx(parameters * trained + frozen + whole_layer)
    assert parts["gradients"] == pytest.approx(gradients * trained)
    assert parts["optimiser"] == pytest.approx(states * trained)
    assert parts.get("bucket", 0) == (4 * BUCKET if stage in (1, 2) else 0)
    assert on_host == 4 * trained


def test_offload_moves_what_the_optimiser_needs_to_the_machine() -> None:
    held, kept = training(SIZE_7B, Train(zero_stage=2), 0, 0)
    moved, on_host = training(SIZE_7B, Train(zero_stage=2, offload=True), 0, 0)
    assert "optimiser" not in moved
    assert on_host >= kept + held["optimiser"]


def test_adapters_train_little_and_freeze_the_backbone() -> None:
    parts, _ = training(SIZE_7B, Train(), lora_rank=16, num_tokens=0)
    adapters = 16 * 32 * (8 * 4096 + 3 * (4096 + 11008))
    assert parts["gradients"] == 4 * adapters
    assert parts["parameters"] == 4 * (adapters + SIZE_7B.num_parameters)


def test_trees_of_a_pass_are_the_trees_of_a_step_over_workers_and_passes() -> None:
    train = {"trees_per_step": 8, "workers": 2, "accumulation": 2}
    config = run_config(train=train, rollout={"first": {"root": 4, "children": 2, "layers": 2}, "max_tokens": 64})
    # 4 + 8 segments of 32 tokens and a prompt of 10, in one part.
    assert pass_tokens(config, Lengths(prompt=10)) == 2 * (12 * 32 + 10)


def test_a_training_step_takes_the_memory_that_was_measured() -> None:
    measured = MEASURED["training"]
    one_b = Size(4, 2048, 8192, 128256, 128256 * 2048, 0, 2048 * (2 * 2048 + 2 * 512 + 3 * 8192), 9 * 2048, 8, 512)
    for kind in ("packed", "packed_split"):
        tokens = measured["tokens"] * measured["computed_per_token"][kind]
        parts, _ = training(one_b, Train(dtype="bfloat16"), 0, tokens)
        estimate = sum(parts.values()) - RUNTIME  # torch counts its tensors only
        assert estimate / GIB == pytest.approx(measured["peak_gib"][kind], rel=0.15)


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_decoding_takes_the_memory_that_was_measured(rows: int) -> None:
    matrices = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    words = 32000 * 4096
    base = Size(32, 4096, 14336, 32000, words, words, matrices, 65 * 4096, 8, 1024)
    models = Models(base, base.backbone(4))
    # Rows have room for 256 tokens, and all prompts are encoded in one pass.
    parts = decoding(run_config(), models, rows, 256 * rows, 16, num_values=2, new_tokens=100 * rows)
    measured = MEASURED["shapes"]["7b"]["rows"][str(rows)]["peak_gib"]["lazy_2"]
    assert (sum(parts.values()) - RUNTIME) / GIB == pytest.approx(measured, rel=0.05)


def test_activations_grow_with_tokens_and_layers() -> None:
    size = SIZE_7B.backbone(8)
    one = activation_bytes(size, 100, "bfloat16")
    assert activation_bytes(size, 200, "bfloat16") == 2 * one
    assert activation_bytes(SIZE_7B, 100, "bfloat16") == 4 * one
    assert activation_bytes(size, 100, "float32") > one


GPU: dict[str, Any] = {
    "base": {"device": "cuda"},
    "rollout": {"gpus_per_actor": 1, "cpus_per_actor": 1},
    "train": {"gpus_per_worker": 1},
    "serve": {"gpus_per_replica": 1},
}


@pytest.mark.parametrize(
    ("sections", "process", "key"),
    [
        ({"rollout": {**GPU["rollout"], "rows": 512}}, "rollout actor", "rollout.rows=256"),
        ({"serve": {**GPU["serve"], "rows": 512}}, "base replica", "serve.rows=128"),
        ({"train": {**GPU["train"], "trees_per_step": 64}}, "training worker", "train.accumulation="),
    ],
)
def test_what_does_not_fit_names_the_key_and_a_value_that_does(sections: Any, process: str, key: str) -> None:
    machines, config = parse_machines("1x8xA100"), run_config(**{**GPU, **sections})
    [fit] = [fit for fit in fits(config, MODELS_7B, Lengths(), machines) if fit.need.process == process]
    assert not fit.fits
    assert key in str(fit.remedy)
    changed: dict[str, Any] = {name: dict(settings) for name, settings in {**GPU, **sections}.items()}
    for assignment in str(fit.remedy).removeprefix("set ").split():
        name, value = assignment.split("=")
        section, setting = name.split(".")
        changed[section][setting] = json.loads(value)
    [after] = [
        fit for fit in fits(run_config(**changed), MODELS_7B, Lengths(), machines) if fit.need.process == process
    ]
    assert after.fits


def test_weights_that_do_not_fit_are_shared_by_a_group() -> None:
    size = shape_size("70b")
    found = fits(run_config(**GPU), Models(size, size.backbone(8)), Lengths(), parse_machines("1x8xH100"))
    [actor] = [fit for fit in found if fit.need.process == "rollout actor"]
    assert not actor.fits
    assert "base.tensor_parallel=" in str(actor.remedy)


def test_processes_on_cores_share_the_memory_of_their_machine() -> None:
    rollout = {"actors": 4, "cpus_per_actor": 2}
    [actor, *_] = fits(run_config(rollout=rollout), MODELS_7B, Lengths(), parse_machines("1x8cpu"))
    assert actor.room == pytest.approx(0.95 * 32 * GIB / 4)


def test_offload_saves_nothing_where_one_memory_holds_everything() -> None:
    machines = parse_machines("1x8cpu")
    needed = []
    for offload in (False, True):
        config = run_config(train={"offload": offload, "zero_stage": 2})
        found = {fit.need.process: fit.need for fit in fits(config, MODELS_7B, Lengths(), machines)}
        needed.append(found["training worker"].total)
    assert needed[0] <= needed[1]


@pytest.mark.parametrize(
    ("value", "iterations", "count"), [("model", 1, 3), ("shared", 1, 1), ("shared", 2, 3), ("states", 2, 0)]
)
def test_value_models_side_by_side(value: str, iterations: int, count: int) -> None:
    assert num_value_models(run_config(3, value={"kind": value}, iterations=iterations)) == count


def test_heads_on_states_are_fitted_beside_the_base_model() -> None:
    config = run_config(2, value={"kind": "states"})
    found = {
        fit.need.process: fit.need for fit in fits(config, Models(SIZE_7B, None), Lengths(), parse_machines("1x8cpu"))
    }
    assert found["training worker"].on_device["weights"] == SIZE_7B.weight_bytes(2)
    assert "value models" not in found["rollout actor"].on_device
    assert "value replica" not in found
