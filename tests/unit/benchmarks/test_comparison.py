"""Mixtures of policies, merged adapters, preference pairs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.comparison.decode import MixtureDecoder
from benchmarks.comparison.load import load_merged
from benchmarks.comparison.merge import add_deltas, deltas_of, read_deltas, weighted_sum
from benchmarks.comparison.mixture import mix
from benchmarks.comparison.pairs import pairs_of
from benchmarks.comparison.policies import RL, PolicySpec, Settings, catalogue, chosen, is_stored, marker
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.core.tilt import Filters
from mavis_dist.core.tree import Finish, Tree, TreeBuilder
from mavis_dist.decode import Choice, Engine, Request, SamplingParams
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.shards import Labels
from mavis_dist.types import UserError
from tests.fakes import tiny_base
from tests.tiny import MODEL, write_base

BASE = tiny_base(seed=1, eos_boost=1.0)  # some answers end, some are cut
STEMS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def adapter_tensors(base: BaseModel, seed: int, size: float = 0.3) -> dict[str, torch.Tensor]:
    """A random adapter of rank 2 on two weights of a tiny model."""
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for stem in STEMS:
        outputs, inputs = base.model.get_parameter(f"{stem}.weight").shape
        for part, shape in (("A", (2, inputs)), ("B", (outputs, 2))):
            tensors[f"base_model.model.{stem}.lora_{part}.weight"] = size * torch.randn(shape, generator=source)
    return tensors


def policy(base: BaseModel, *parts: tuple[int, float]) -> BaseModel:
    """The base model with adapters of these seeds and weights."""
    model = copy.deepcopy(base.model)
    add_deltas(model, weighted_sum((deltas_of(adapter_tensors(base, seed), 2.0), weight) for seed, weight in parts))
    return replace(base, model=model)


def requests(count: int = 6, tokens: int = 10, top_k: int = 5) -> list[Request]:
    """Every second prompt is that of the one before."""
    prompts = [tuple(range(5, 9 + n // 2)) for n in range(count)]
    params = [SamplingParams(tokens, top_k=top_k, seed=n) for n in range(count)]
    return [Request(str(n), prompt, params=p) for n, (prompt, p) in enumerate(zip(prompts, params, strict=True))]


def filters(rows: int, top_k: int) -> Filters:
    return Filters.of([top_k] * rows, [1.0] * rows, [0.0] * rows, [1.0] * rows, torch.device("cpu"))


def tokens_of(choices: list[Choice]) -> list[list[int]]:
    return [choice.tokens for choice in choices]


# The distribution


def test_a_mixture_and_its_divergence_by_hand() -> None:
    """Base 1/2, 1/4 on the two candidates of three tokens; policies 3:1 and 1:1 there, weights 1/2 each."""
    base, one, other = torch.tensor([[0.5, 0.25, 0.1]]), torch.tensor([[0.6, 0.2, 9.0]]), torch.tensor([[0.1, 0.1, 3]])
    mixture = mix(base.log(), [one.log(), other.log()], [0.5, 0.5], 1.0, filters(1, 2))
    share = math.sqrt(3) / (1 + math.sqrt(3))
    assert mixture.ids_BK.tolist() == [[0, 1]]
    assert mixture.logprobs_BK.exp().tolist()[0] == pytest.approx([share, 1 - share])
    by_hand = share * math.log(share / (2 / 3)) + (1 - share) * math.log((1 - share) / (1 / 3))
    assert float(mixture.divergence_B[0]) == pytest.approx(by_hand)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_a_single_policy_at_full_strength_is_itself_on_the_base_models_support(strength: float) -> None:
    base, other = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.randn(3, 20)
    mixture = mix(base, [other], [1.0], strength, filters(3, 6))
    wanted = strength * other.gather(1, mixture.ids_BK) + (1 - strength) * base.gather(1, mixture.ids_BK)
    torch.testing.assert_close(mixture.logprobs_BK, wanted.double().log_softmax(-1))
    expected = (mixture.logprobs_BK.exp() * (mixture.logprobs_BK - mixture.base_logprobs_BK)).sum(-1)
    torch.testing.assert_close(mixture.divergence_B, expected)


def test_the_base_model_as_its_own_policy_spends_nothing() -> None:
    logits = torch.randn(4, 30)
    divergence_B = mix(logits, [logits + 3.0], [1.0], 1.0, filters(4, 10)).divergence_B
    torch.testing.assert_close(divergence_B, torch.zeros(4).double(), atol=1e-6, rtol=0)


def test_rows_with_fewer_candidates_stay_finite() -> None:
    rows = Filters.of([4, 4], [0.5, 1.0], [0.0, 0.0], [1.0, 1.0], torch.device("cpu"))
    base = torch.tensor([[9.0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    mixture = mix(base, [torch.randn(2, 5)], [1.0], 1.0, rows)
    assert mixture.logprobs_BK[0].isfinite().sum() == 1
    assert float(mixture.divergence_B[0]) == pytest.approx(0.0)
    assert math.isfinite(mixture.divergence_B[1])


# Answers


def test_without_strength_the_answers_are_those_of_the_base_model_in_the_engine() -> None:
    asked = requests()
    expected = [choice for [choice] in Engine(BASE).generate(asked)]
    found = MixtureDecoder(BASE, [policy(BASE, (1, 1.0))], max_rows=4).answer(asked, strength=0.0)
    assert tokens_of(found) == tokens_of(expected)
    assert [choice.finish for choice in found] == [choice.finish for choice in expected]
    assert [choice.text for choice in found] == [choice.text for choice in expected]
    assert [choice.divergence for choice in found] == pytest.approx([0.0] * len(asked), abs=1e-12)


def test_a_merged_policy_beside_the_base_model_is_the_policy_itself() -> None:
    """With all tokens as candidates there is no truncation that could differ."""
    trained, asked = policy(BASE, (1, 1.0)), requests(top_k=97)
    expected = [choice for [choice] in Engine(trained).generate(asked)]
    found = MixtureDecoder(BASE, [trained]).answer(asked)
    assert tokens_of(found) == tokens_of(expected)
    assert all(choice.divergence > 0 for choice in found)


def test_divergences_are_those_of_a_plain_forward_pass() -> None:
    trained, asked = policy(BASE, (1, 1.0)), requests(count=2)
    for request, choice in zip(asked, MixtureDecoder(BASE, [trained]).answer(asked), strict=True):
        ids = torch.tensor([[*request.prompt, *choice.tokens[:-1]]])
        base_TV, policy_TV = (m.model(input_ids=ids).logits[0, len(request.prompt) - 1 :] for m in (BASE, trained))
        base_TV[0, list(BASE.eos_ids)] = -torch.inf
        total = 0.0
        for base_V, policy_V in zip(base_TV, policy_TV, strict=True):
            ids_K = base_V.topk(5).indices
            log_p_K, log_pi_K = base_V[ids_K].log_softmax(-1), policy_V[ids_K].log_softmax(-1)
            total += float((log_pi_K.exp() * (log_pi_K - log_p_K)).sum())
        assert choice.divergence == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("corner", [0, 1])
def test_a_mixture_at_a_corner_is_that_policy(corner: int) -> None:
    policies, asked = [policy(BASE, (seed, 1.0)) for seed in (1, 2)], requests()
    weights = [float(m == corner) for m in range(2)]
    mixed = MixtureDecoder(BASE, policies).answer(asked, weights)
    alone = MixtureDecoder(BASE, [policies[corner]]).answer(asked)
    assert tokens_of(mixed) == tokens_of(alone)
    assert [c.divergence for c in mixed] == pytest.approx([c.divergence for c in alone])


def test_answers_do_not_depend_on_their_neighbours() -> None:
    trained, asked = policy(BASE, (1, 1.0)), requests()
    together = MixtureDecoder(BASE, [trained], max_rows=3).answer(asked)
    alone = [MixtureDecoder(BASE, [trained]).answer([one])[0] for one in asked]
    assert tokens_of(together) == tokens_of(alone)


# Merged adapters


def test_an_adapter_is_merged_as_peft_merges_it() -> None:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    tensors = adapter_tensors(BASE, 3)
    model = get_peft_model(copy.deepcopy(BASE.model), LoraConfig(r=2, lora_alpha=4, target_modules=list(STEMS)))
    set_peft_model_state_dict(model, tensors)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(
        policy(BASE, (3, 1.0)).model(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )


def test_a_soup_interpolates_weights() -> None:
    soup, ends = policy(BASE, (1, 0.3), (2, 0.7)), [policy(BASE, (seed, 1.0)) for seed in (1, 2)]
    for name, weight in soup.model.named_parameters():
        one, other = (end.model.get_parameter(name) for end in ends)
        torch.testing.assert_close(weight, 0.3 * one + 0.7 * other, atol=1e-5, rtol=1e-5)


def test_differences_below_the_steps_of_half_precision_survive_on_average() -> None:
    model = torch.nn.Linear(256, 256, bias=False).bfloat16().requires_grad_(False)
    before, delta = model.weight.float(), 1e-5 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    add_deltas(model, {"weight": delta})
    kept = float(((model.weight.float() - before) * delta).sum() / (delta * delta).sum())
    assert kept == pytest.approx(1.0, abs=0.15)
    rounded = model.weight.clone()
    add_deltas(model, {"weight": torch.zeros(256, 256)})
    assert torch.equal(model.weight, rounded)


# Stored policies


def make_config(folder: Path) -> Config:
    return config_module.parse(
        {
            "run": "run",
            "storage": str(folder / "runs"),
            "objectives": {"brief": {"reward": "brevity"}, "positive": {"reward": "sentiment"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Store]:
    """A run with two stored policies of random adapters."""
    folder = tmp_path_factory.mktemp("run")
    base, config = load_base(str(write_base(folder))), make_config(folder)
    store = Store(config.storage, config.run)
    for seed, name in enumerate(("one", "two")):
        work = folder / name
        work.mkdir()
        save_file(adapter_tensors(base, seed), work / "adapter_model.safetensors")
        (work / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
        spec = PolicySpec(name, RL, {"brief": 1.0}, 0.1)
        store.upload(work, spec.folder, marker(spec, Settings(), base.fingerprint, "", {"tokens": 1}))
    return config, store


def test_a_soup_at_a_corner_is_that_policy(run: tuple[Config, Store]) -> None:
    config, store = run
    corner, alone = load_merged(config, store, {"one": 1.0, "two": 0.0}), load_merged(config, store, {"one": 1.0})
    plain = load_base(config.base.model)
    for name, weight in corner.model.named_parameters():
        assert torch.equal(weight, alone.model.get_parameter(name))
    name = f"{STEMS[0]}.weight"
    expected = plain.model.get_parameter(name) + read_deltas(store.download("policies/one"))[name]
    torch.testing.assert_close(corner.model.get_parameter(name), expected)
    assert torch.equal(
        load_merged(config, store, {"one": 1.0}, 0.0).model.get_parameter(name), plain.model.get_parameter(name)
    )


def test_policies_that_do_not_fit_are_refused(run: tuple[Config, Store]) -> None:
    config, store = run
    with pytest.raises(StoreError, match="no finished policy 'three'"):
        load_merged(config, store, {"three": 1.0})
    spec = PolicySpec("other-base", RL, {"brief": 1.0}, 0.1)
    store.upload(store.download("policies/one"), spec.folder, marker(spec, Settings(), "another", "", {}))
    with pytest.raises(StoreError, match="another base model"):
        load_merged(config, store, {"other-base": 1.0})
    assert is_stored(store, spec, Settings())
    with pytest.raises(UserError, match="with seconds"):
        is_stored(store, spec, replace(Settings(), seconds=1.0))


def test_the_catalogue_has_every_objective_and_three_weights_per_pair() -> None:
    specs = catalogue(["a", "b", "c"], rl_kls=(0.1,), dpo_kls=(0.2,), tag="-2")
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names) == 3 + 3 + 9
    assert {"rl-a-kl0.1-2", "dpo-c-kl0.2-2", "morlhf-a0.25-b0.75-kl0.1-2"} <= set(names)
    assert all(sum(spec.weights.values()) == pytest.approx(1) for spec in specs)
    assert [spec.name for spec in chosen(specs, ["dpo-*", "rl-b*"])] == [
        n for n in names if n[:2] == "dp" or "rl-b" in n
    ]
    with pytest.raises(UserError, match="'ppo'"):
        chosen(specs, ["ppo"])


# Preference pairs


def make_tree(prompt_id: str, answers: list[list[int]]) -> Tree:
    builder = TreeBuilder(prompt_id, "base", 0, [1, 2, len(prompt_id)])
    stem = builder.add(-1, 0, [50], [0.0], Finish.OPEN)
    for answer in answers:
        builder.add(stem, 1, answer, [0.0] * len(answer), Finish.STOP)
    return builder.build()


def test_pairs_are_the_best_against_the_worst_answer_to_the_same_prompt() -> None:
    tree = make_tree("a", [[10], [11], [12, 2], [13], [14]])
    labels = Labels("a", tree.leaves(), np.array([3.0, 1.0, 5.0, 2.0, 4.0]))
    [pair] = pairs_of([(tree, labels)])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ([1, 2, 1], [50, 12, 2], [50, 11], 4.0)
    second = pairs_of([(tree, labels)], per_prompt=9)[1:]
    assert [(p.chosen, p.rejected) for p in second] == [([50, 14], [50, 13])]


def test_equal_rewards_and_excluded_prompts_make_no_pairs() -> None:
    trees = [make_tree(name, [[10], [11]]) for name in ("same", "left-out", "kept")]
    scores = [np.array([1.0, 1.0]), np.array([1.0, 2.0]), np.array([1.0, 2.0])]
    labelled = [(t, Labels(t.prompt_id, t.leaves(), s)) for t, s in zip(trees, scores, strict=True)]
    [pair] = pairs_of(labelled, {"left-out"}, per_prompt=3)
    assert pair.prompt == trees[2].prompt_tokens.tolist()
