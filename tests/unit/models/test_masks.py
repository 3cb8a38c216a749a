"""Packed trees, decoding and transformers itself see the same tokens, whatever windows the layers of a model have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Gemma3Config

from benchmarks.models.architectures import tiny_model
from benchmarks.models.measure import RIGHT, base_model, decoder, grow, measure, paths, tree_set, value_model
from mavis_dist.core import packing
from mavis_dist.decode import Engine
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.directory import ModelError
from mavis_dist.models.masks import CHUNKED, FULL, WINDOWED, check_masks, layer_types, tree_inputs
from mavis_dist.models.states import first_layers, truncate
from mavis_dist.models.trial import MOST_PARAMETERS, _with_random_weights, try_model
from mavis_dist.models.value import ValueModel, ValueModelError, from_base
from mavis_dist.train import fit, heads
from mavis_dist.train.distill.labels import Sampling, label_tree, labelled, values_of

WINDOWS = {
    "mistral": {WINDOWED},
    "phi3": {WINDOWED},
    "starcoder2": {WINDOWED},
    "qwen2": {FULL, WINDOWED},
    "gemma2": {FULL, WINDOWED},
    "gpt_oss": {FULL, WINDOWED},
    "olmo3, a window in one layer": {FULL, WINDOWED},
    "llama4_text, chunks in one layer": {FULL, CHUNKED},
}
WITHOUT = ["gptj", "llama, a window in its config only"]
REFUSED = {
    "falcon, alibi": "'falcon' cannot be decoded here .it adds biases by place in the row",
    "bloom": "'bloom' cannot be decoded here .it does not take position_ids",
    "mpt": "'mpt' cannot be decoded here .it does not take position_ids",
    "roberta": "'roberta' cannot be decoded here .it does not follow positions and masks",
    "xlm-roberta-xl": "'xlm-roberta-xl' cannot be decoded here .it does not follow positions and masks",
    "bert, not causal": "'bert' cannot be decoded here .it does not follow positions and masks",
    "gpt_neo": "'gpt_neo' cannot be decoded here .it does not follow positions and masks",
    "gpt_neo, global layers only": "'gpt_neo' cannot be decoded here .it does not decode rows of different lengths",
    "gpt_neox_japanese": "'gpt_neox_japanese' cannot be decoded here .it fails on a text in two pieces",
    "mamba": "'mamba' cannot be decoded here .it has layers of type linear_attention",
    "openai-gpt": "'openai-gpt' cannot be decoded here .it keeps no keys and values",
}


@pytest.mark.parametrize("name", [*WINDOWS, *WITHOUT])
def test_packed_trees_and_decoding_have_the_values_of_every_path(name: str) -> None:
    found = measure(name)
    assert found["outcome"] == RIGHT
    assert found["layers"] == sorted(WINDOWS.get(name, {FULL}))
    assert found["packed"] < 1e-4
    assert found["decoded"] < 1e-4
    assert found["guided"]
    assert found["fitted"]


@pytest.mark.parametrize("name", list(WINDOWS))
def test_windows_bite(name: str) -> None:
    """A mask of ancestors alone changes values by more than a tenth of their standard deviation."""
    model = tiny_model(name)
    [tree] = grow(Engine(base_model(model)))
    value, batch = value_model(decoder(model), tree), tree_set(tree).batch([0])
    inputs = tree_inputs(value.backbone, batch.tokens_BS, batch.positions_BS, batch.mask_BSS)
    mask_B1SS = batch.mask_BSS[:, None]
    if value.backbone.config._attn_implementation == "eager":
        mask_B1SS = torch.zeros(mask_B1SS.shape).masked_fill(~mask_B1SS, torch.finfo(torch.float32).min)
    wrong = value(**{**inputs, "attention_mask": mask_B1SS})
    assert (wrong - fit.outputs(value, batch)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2"])
def test_distillation_and_closed_form_fits_see_windows_too(name: str) -> None:
    model = tiny_model(name)
    base = base_model(model)
    [tree] = grow(Engine(base))
    value = value_model(model.base_model, tree)
    values_X = values_of(value, tree)[:, 0]
    _, mask_SS = packing.visibility(tree)
    for leaf, path in zip(tree.leaves(), paths(tree), strict=True):
        last = len(tree.prompt_tokens) + int(tree.node_start[leaf + 1]) - 1
        is_mine_X = mask_SS[last][labelled(tree)]
        right = value(input_ids=path)[0, len(tree.prompt_tokens) - 1 :, 0]
        np.testing.assert_allclose(values_X[is_mine_X], right.numpy(), atol=1e-4)
    label = label_tree(base, [(value, 0)], tree, Sampling(5, 4, 20, 1.0, 0.0), 0)
    np.testing.assert_allclose(label.values_XM[: len(values_X), 0], values_X, atol=1e-4)

    trees = tree_set(tree)
    states = ValueModel(first_layers(model, 1), 1).eval().requires_grad_(False)
    torch.nn.init.normal_(states.heads.weight, std=0.1)
    loss = heads.errors(states, [trees], [0]).loss(0.0).at(heads.heads_of(states))
    with torch.no_grad():
        error = fit.squared_error(states, trees, [0], "cpu") / trees.total_weight([0])
    assert float(loss) == pytest.approx(float(error), rel=1e-4)


def test_adapters_change_nothing_about_windows() -> None:
    model = tiny_model("qwen2")
    [tree] = grow(Engine(base_model(model)))
    value, batch = value_model(model.base_model, tree), tree_set(tree).batch([0])
    right = fit.outputs(value, batch)
    lora: Any = LoraConfig(r=2, target_modules=["q_proj"])  # starts as no change
    value.backbone = get_peft_model(value.backbone, lora)  # type: ignore[assignment]
    assert layer_types(value.backbone) == {FULL, WINDOWED}
    torch.testing.assert_close(fit.outputs(value.eval(), batch), right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_kinds_are_refused_by_name(name: str) -> None:
    model: Any = tiny_model(name)
    with pytest.raises(ModelError, match=REFUSED[name]):
        base_decoder(model)


def test_a_refusal_is_one_line_with_the_reason() -> None:
    with pytest.raises(ModelError) as caught:
        try_model(tiny_model("roberta").base_model)
    assert "\n" not in str(caught.value)
    assert "docs/models.md" in str(caught.value)


def test_attention_that_takes_no_masks_of_trees_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="its attention is flash_attention_2"):
        check_masks(model.base_model)


@pytest.mark.parametrize("name", ["mistral", "llama4_text"])
def test_the_trial_leaves_the_windows_of_a_model_as_they_are(name: str) -> None:
    model: Any = tiny_model(name)
    before = model.config.to_dict()
    try_model(model.base_model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        ("mask", torch.float32),
        ("positions", torch.float32),
        ("positions", torch.bfloat16),
        (None, torch.float32),
        (None, torch.bfloat16),
    ],
)
def test_the_trial_finds_a_model_that_does_not_do_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, wrong: str | None, dtype: torch.dtype
) -> None:
    """One whose own causal mask, or own count of positions, holds for the row."""
    model: Any = tiny_model("gpt2").to(dtype)  # type: ignore[arg-type]

    def given(backbone: Any, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        positions = torch.arange(tokens.shape[1])[None] if wrong == "positions" else positions
        return tree_inputs(backbone, tokens, positions, torch.ones_like(mask).tril() if wrong == "mask" else mask)

    monkeypatch.setattr("mavis_dist.models.trial.tree_inputs", given)
    if wrong is None:
        try_model(model.base_model)
        return
    with pytest.raises(ModelError, match="does not follow positions and masks"):
        try_model(model.base_model)


def test_the_trial_finds_a_mask_that_the_model_does_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were masks made here without windows, no model with windows would be accepted."""
    model: Any = tiny_model("mistral")
    monkeypatch.setattr("mavis_dist.models.masks.layer_types", lambda _: {FULL})
    with pytest.raises(ModelError, match="'mistral' cannot be decoded here"):
        try_model(model.base_model)


def without_weights(name: str) -> Any:
    """The same architecture on torch's device `meta`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model(name).config)


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_config_alone_is_enough_to_refuse(name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]):
        base_decoder(without_weights(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen2", "phi3", "gemma3_text"])
def test_a_config_alone_is_enough_for_a_trial_and_is_not_changed(name: str) -> None:
    model = without_weights(name)
    before = model.config.to_dict()
    base_decoder(model, use_hf_forward=True)
    assert model.config.to_dict() == before


def test_a_trial_with_random_weights_finds_forgotten_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_weights("mistral")
    monkeypatch.setattr("mavis_dist.models.masks.layer_types", lambda _: {FULL})
    with pytest.raises(ModelError, match="'mistral' cannot be decoded here"):
        base_decoder(model)


def test_one_layer_of_each_kind_is_tried_of_a_large_model() -> None:
    kinds = [*["full_attention"] * 21, *["sliding_attention"] * 7]
    sizes = {"hidden_size": 64, "num_hidden_layers": 28, "use_sliding_window": True}
    config = AutoConfig.for_model("qwen2", layer_types=kinds, **sizes)
    random = _with_random_weights(config)
    assert layer_types(random) == {FULL, WINDOWED}
    assert random.config.num_hidden_layers == 4
    assert config.num_hidden_layers == len(config.layer_types) == 28


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_trial_of_a_large_model_is_of_a_few_of_its_parameters(kind: str) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = AutoConfig.for_model(kind, num_attention_heads=32, num_key_value_heads=8, head_dim=128, **sizes)
    random = _with_random_weights(config)
    assert 1 <= random.config.num_hidden_layers <= 3
    assert random.num_parameters() <= MOST_PARAMETERS < 2e8


@pytest.mark.parametrize("fails", [_with_random_weights, try_model])
@pytest.mark.parametrize("shortage", [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_machine_without_memory_says_nothing_about_a_model(
    monkeypatch: pytest.MonkeyPatch, fails: Any, shortage: type[Exception]
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise shortage("out of memory")

    model: Any = tiny_model("llama").base_model
    monkeypatch.setattr(type(model), "forward", forward)
    monkeypatch.setattr("mavis_dist.models.trial.check_masks", lambda _: None)
    with pytest.raises(shortage, match="out of memory"):
        fails(model.config if fails is _with_random_weights else model)


@pytest.mark.parametrize("name", ["hrm_text", "gemma4_text"])
def test_a_model_whose_layers_cannot_be_cut_is_tried_whole(name: str) -> None:
    model: Any = tiny_model(name)
    assert _with_random_weights(model.config) is not None
    base_decoder(without_weights(name), use_hf_forward=True)


def test_a_model_that_refuses_the_sizes_of_the_trial_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("not with a vocabulary of 128 tokens")

    model = without_weights("llama")
    monkeypatch.setattr(type(model.base_model), "forward", forward)
    monkeypatch.setattr("mavis_dist.models.trial.check_masks", lambda _: None)
    try_model(model.base_model)


@pytest.mark.parametrize("kind", ["gemma2", "gptj", "codegen", "xglm", "gpt_oss"])
def test_models_without_sdpa_are_trained_with_the_attention_that_they_have(tmp_path: Path, kind: str) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    model = from_base(tmp_path, 1)
    assert model.backbone.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


def test_a_backbone_without_all_of_its_weights_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights layers\.0\.mlp\.up_proj\.weight"):
        from_base(tmp_path, 1)


def test_a_model_with_images_cannot_be_a_value_model(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueModelError, match=r"'gemma3' cannot be a value model .*value\.backbone"):
        from_base(tmp_path, 1)


def test_layers_within_a_model_with_images_are_not_shared() -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(Gemma3Config())
    with pytest.raises(ModelError, match="'gemma3' cannot be shared"):
        first_layers(model, 1)


@pytest.mark.parametrize("kind", ["roberta", "bert, not causal", "falcon, alibi"])
def test_a_backbone_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be decoded here"):
        from_base(tmp_path, 1)


def test_all_lists_by_layer_are_cut() -> None:
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=4)
    config.no_rope_layers = [1, 0, 1, 1]
    truncate(config, 2)
    assert (config.num_hidden_layers, len(config.layer_types), config.no_rope_layers) == (2, 2, [1, 0])
    assert len(AutoModel.from_config(_narrow(config)).layers) == 2


def _narrow(config: Any) -> Any:
    for key, size in {"hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 16, "vocab_size": 9}.items():
        setattr(config, key, size)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_local_experts = 4, 2, 8, 2
    config.pad_token_id = 0
    return config
