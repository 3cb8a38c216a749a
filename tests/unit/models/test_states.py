"""Value models on the base model's states: their values are heads on its hidden states, and they hold no backbone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from mavis_dist.core.packing import visibility
from mavis_dist.models import value
from mavis_dist.models.decoder import base_decoder, value_decoder
from mavis_dist.models.fused import FusedDecoder
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel
from mavis_dist.models.native import NativeDecoder
from mavis_dist.models.packed import packed_layers
from mavis_dist.models.states import StateLayerError, first_layers, state_layer
from mavis_dist.models.value import Card, ValueModel, ValueModelError
from mavis_dist.types import RewardScale
from tests.fakes import tiny_base, tiny_states
from tests.unit.train.test_metrics import random_tree

CARD = Card(
    objectives=("kind",),
    scales=(RewardScale(0.5, 2.0),),
    rewards=({"reward": "sentiment"},),
    iteration=0,
    parent=None,
    base_fingerprint="tiny-base",
    tokenizer_fingerprint="tiny-tokenizer",
    max_tokens=24,
    beta=0.0,
    r2=0.5,
    state_layer=1,
)


@torch.no_grad()
def direct(base: BaseModel, model: ValueModel, ids: list[int], layer: int = 1) -> torch.Tensor:
    """All heads' values of every token, from the hidden states that transformers itself returns."""
    model_ = copy.deepcopy(base.model)
    hidden = model_(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
    return model.heads(model_.base_model.norm(hidden))[0]


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_values_are_heads_on_the_hidden_states_of_the_base_model(head_size: int) -> None:
    base = tiny_base(head_size=head_size)
    model = tiny_states(base, 3, num_objectives=2)
    ids = [1, 5, 9, 30, 31, 7]
    expected = direct(base, model, ids)
    torch.testing.assert_close(model(input_ids=torch.tensor([ids]))[0], expected, atol=1e-5, rtol=1e-5)
    slots = SlotModel(value_decoder(model))
    slots.open(0)
    torch.testing.assert_close(slots.extend([0], [ids[:-1]], [5]), expected[:-1], atol=1e-5, rtol=1e-5)
    branched = slots.branch([0], [2], torch.tensor([11, ids[-1]]))
    torch.testing.assert_close(branched[1], expected[-1], atol=1e-5, rtol=1e-5)


def test_values_of_a_packed_tree_are_those_of_its_paths() -> None:
    base, tree = tiny_base(), random_tree(4)
    model = tiny_states(base, 3)
    positions_S, mask_SS = visibility(tree)
    tokens_S = torch.tensor([*tree.prompt_tokens, *tree.tokens])
    packed = model(
        input_ids=tokens_S[None],
        position_ids=torch.from_numpy(positions_S)[None],
        attention_mask=torch.from_numpy(mask_SS)[None, None],
    )[0]
    for s, sees in enumerate(torch.from_numpy(mask_SS)):
        expected = direct(base, model, tokens_S[sees].tolist())[-1]
        torch.testing.assert_close(packed[s], expected, atol=1e-5, rtol=1e-5)


def test_they_share_the_weights_and_the_layers_object_of_the_base_model() -> None:
    base = tiny_base(head_size=64)
    base_decoder(base.model)
    view = first_layers(base.model, 1)
    assert first_layers(base.model, 1) is view
    assert first_layers(base.model, 2) is not view
    assert len(view.layers) == 1 < len(base.model.base_model.layers)
    assert view.config.num_hidden_layers == 1 < base.model.config.num_hidden_layers
    assert view.layers[0] is base.model.base_model.layers[0]
    assert isinstance(value_decoder(tiny_states(base, 1)), NativeDecoder)
    assert packed_layers(view)[0] is packed_layers(base.model.base_model)[0]


def test_the_layers_of_a_fused_decoder_are_shared_too() -> None:
    base = tiny_base()
    mine, theirs = value_decoder(tiny_states(base, 1)), base_decoder(base.model)
    assert isinstance(mine, FusedDecoder)
    assert isinstance(theirs, FusedDecoder)
    assert mine._blocks[0] is theirs._blocks[0]


def test_the_folder_holds_heads_only_and_they_come_back_on_the_base_model(tmp_path: Path) -> None:
    base = tiny_base()
    model = tiny_states(base, 3)
    value.save(model, CARD, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"heads.weight", "heads.bias"}
    assert LlamaConfig.from_pretrained(tmp_path).num_hidden_layers == 1
    loaded, card = value.load(tmp_path, base=base)
    assert card == CARD
    assert loaded.backbone is model.backbone
    assert torch.equal(loaded.heads.weight, model.heads.weight)


@pytest.mark.parametrize(
    "change", [{"heads.bias": None}, {"heads.more": torch.zeros(1)}, {"heads.weight": torch.zeros(1, 5)}]
)
def test_loading_is_strict(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    base = tiny_base()
    value.save(tiny_states(base, 3), CARD, tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ValueModelError, match="incomplete"):
        value.load(tmp_path, base=base)


def test_heads_for_another_base_models_states_are_refused(tmp_path: Path) -> None:
    base = tiny_base()
    value.save(tiny_states(base, 3), CARD, tmp_path)
    with pytest.raises(ValueModelError, match="'kind' was trained for base model tiny-base, this one is other"):
        value.load(tmp_path, base=replace(base, fingerprint="other"))
    with pytest.raises(ValueModelError, match="'kind' reads its base model's states: load it with a base model"):
        value.load(tmp_path)


def test_a_card_of_another_kind_has_no_layer(tmp_path: Path) -> None:
    """Cards of models with a backbone of their own stay as they were."""
    value.save(tiny_states(tiny_base(), 3), replace(CARD, state_layer=None), tmp_path)
    assert "state_layer" not in (tmp_path / value.CARD_FILE).read_text()
    assert value.load_card(tmp_path).state_layer is None


def test_the_layer_is_two_thirds_of_the_depth_and_never_beyond_it() -> None:
    config = LlamaConfig(num_hidden_layers=30)
    assert state_layer(config, None) == 20
    assert state_layer(config, 30) == 30
    assert state_layer(LlamaConfig(num_hidden_layers=1), None) == 1
    with pytest.raises(StateLayerError, match=r"value.layers is 31 but the base model has 30 layers"):
        state_layer(config, 31)


def test_other_architectures_share_their_layers_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    view, ids = first_layers(model, 2), torch.tensor([[3, 4, 5]])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(view(input_ids=ids).last_hidden_state, model.transformer.ln_f(hidden))
