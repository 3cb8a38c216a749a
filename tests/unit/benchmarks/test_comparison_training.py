"""Policies trained by TRL, on a tiny random model; skipped where TRL is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from benchmarks.comparison import fit, train, usage
from benchmarks.comparison.decode import MixtureDecoder
from benchmarks.comparison.fit import scale_of, train_policy, training_prompts
from benchmarks.comparison.load import load_merged
from benchmarks.comparison.merge import add_deltas
from benchmarks.comparison.mixture import mix
from benchmarks.comparison.policies import DPO, FOLDER, RL, TRAINING, PolicySpec, Settings
from benchmarks.comparison.scoring import score_on_support
from benchmarks.comparison.trainers import Merged, Sampler, extremes
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.core.tilt import Filters
from mavis_dist.core.tree import Finish, TreeBuilder
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.run_state import LAST_LINE
from mavis_dist.store.files import Store
from mavis_dist.store.layout import CONFIG_FILE, label_folder, rollout_folder
from mavis_dist.store.shards import Labels, write_labels, write_trees
from mavis_dist.types import Policy
from tests.tiny import MODEL, count_capitals, count_vowels, write_base

SETTINGS = Settings(
    seconds=40,
    tokens=100_000,
    rank=8,
    alpha=32,
    rl_learning_rate=5e-3,
    dpo_learning_rate=5e-3,
    answers_per_prompt=8,
    sampled_per_answer=1,
    save_steps=2,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYER = {"root": 4, "children": 2, "layers": 1}
VOWELS = PolicySpec("rl-vowels", RL, {"vowels": 1.0}, 0.01)


def make_config(folder: Path, **rollout: int) -> Config:
    return config_module.parse(
        {
            "run": "run",
            "storage": str(folder / "runs"),
            "objectives": {
                "vowels": {"reward": "function", "path": "tests.tiny:count_vowels"},
                "loud": {"reward": "function", "path": "tests.tiny:count_capitals"},
            },
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
            "prompts": {"train": 20, "validation": 4, "evaluation": 8},
            "rollout": {"max_tokens": 12, "first": LAYER, "later": LAYER, **rollout},
        }
    )


def write_labelled_trees(config: Config, store: Store, base: BaseModel) -> None:
    """Eight answers of the base model to every training prompt, and their rewards."""
    engine = Engine(base)
    trees, labels = [], {"vowels": list[Labels](), "loud": list[Labels]()}
    for prompt in fit.load_prompts(config.prompts, config.seed)[0]:
        tokens = base.chat(prompt.text, config.base.system)
        builder = TreeBuilder(prompt.id, "base", 0, list(tokens))
        request = Request("", tokens, params=SamplingParams(config.rollout.max_tokens, seed=0, n=8))
        [choices] = engine.generate([request])
        for choice in choices:
            builder.add(-1, 0, choice.tokens, [0.0] * len(choice.tokens), Finish.LENGTH)
        trees.append(builder.build())
        texts = [choice.text for choice in choices]
        scores = {"vowels": count_vowels([], texts), "loud": count_capitals([], texts)}
        for name, found in scores.items():
            labels[name].append(Labels(prompt.id, trees[-1].leaves(), np.array(found)))
    folder = rollout_folder(Policy())
    write_trees(store, f"{folder}/part-00000.parquet", trees)
    store.finish(folder, {})
    for name, rows in labels.items():
        write_labels(store, f"{label_folder(Policy(), name)}/part-00000.parquet", rows)
        store.finish(label_folder(Policy(), name), {})


@pytest.fixture
def run(tmp_path: Path) -> tuple[Config, Store]:
    base, config = load_base(str(write_base(tmp_path, eos_weight=1.0))), make_config(tmp_path)
    store = Store(config.storage, config.run)
    write_labelled_trees(config, store, base)
    return config, store


def mean_vowels(config: Config, policy: BaseModel, base: BaseModel) -> float:
    """Of answers to unseen prompts."""
    prompts = fit.load_prompts(config.prompts, config.seed)[1] * 8
    params = SamplingParams(config.rollout.max_tokens)
    requests = [
        Request("", base.chat(prompt.text, config.base.system), params=replace(params, seed=n))
        for n, prompt in enumerate(prompts)
    ]
    return fmean(count_vowels([], [choice.text for choice in MixtureDecoder(base, [policy]).answer(requests)]))


def steps(count: int) -> Callable[..., None]:
    """A budget of optimiser steps."""

    def on_step_end(self: usage.Budget, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.usage.steps = state.global_step
        control.should_training_stop = state.global_step >= count

    return on_step_end


def test_rl_raises_its_reward(run: tuple[Config, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = run
    monkeypatch.setattr(usage.Budget, "on_step_end", steps(20))
    metadata = train_policy(VOWELS, SETTINGS, config, store)
    assert metadata["steps"] == 20
    assert metadata["answers"] == metadata["reward_calls"] == 20 * 64
    assert 20 * 64 <= metadata["tokens"] <= 20 * 64 * 12
    base, sd = load_base(config.base.model), scale_of(config, store, "vowels").sd
    policy = load_merged(config, store, {VOWELS.name: 1.0})
    assert mean_vowels(config, policy, base) > mean_vowels(config, base, base) + sd
    assert not store.list(f"{TRAINING}/{VOWELS.name}")
    history = [json.loads(line) for line in store.read_bytes(f"{VOWELS.folder}/metrics.jsonl").decode().splitlines()]
    assert [entry["step"] for entry in history][:20] == list(range(1, 21))


def test_rl_converges_to_the_optimum_of_the_tilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one token: pi is proportional to p exp(r / kl), r in standard deviations, on the base's candidates,
    which are few enough for the tiny model to represent it.
    """
    base, config = load_base(str(write_base(tmp_path))), make_config(tmp_path, max_tokens=1, top_k=8)
    store, spec = Store(config.storage, config.run), PolicySpec("rl", RL, {"loud": 1.0}, 1.0)
    write_labelled_trees(config, store, base)
    monkeypatch.setattr(usage.Budget, "on_step_end", steps(30))
    train_policy(spec, replace(SETTINGS, prompts_per_step=16, rows_per_pass=128, save_steps=1000), config, store)
    policy, scale = load_merged(config, store, {"rl": 1.0}), scale_of(config, store, "loud")
    filters = Filters.of([8], [1.0], [0.0], [1.0], base.model.device)
    before, after = [], []
    for prompt in training_prompts(config):
        ids = torch.tensor([base.chat(prompt.text, config.base.system)])
        base_BV, policy_BV = (model.model(input_ids=ids).logits[:, -1] for model in (base, policy))
        base_BV[:, list(base.eos_ids)] = -torch.inf
        mixture = mix(base_BV, [policy_BV], [1.0], 1.0, filters)
        texts = [base.tokenizer.decode(token) for token in mixture.ids_BK[0].tolist()]
        reward_BK = torch.tensor([[scale.standardise(score) for score in count_capitals([], texts)]])
        optimum_BK = (mixture.base_logprobs_BK + reward_BK / spec.kl).log_softmax(-1)
        for found, logprobs_BK in ((before, mixture.base_logprobs_BK), (after, mixture.logprobs_BK)):
            found.append(float((logprobs_BK.exp() * (logprobs_BK - optimum_BK)).sum()))
    assert fmean(before) > 0.3
    assert fmean(after) < 0.03


def test_the_best_and_the_worst_of_many_answers_are_trained_on(
    run: tuple[Config, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = np.array([3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 4.0, 6.0])
    assert extremes(totals, group=4, kept=2) == [3, 0, 6, 7]
    assert extremes(totals, group=4, kept=3) == [3, 2, 0, 6, 5, 7]
    assert sorted(extremes(totals, group=4, kept=4)) == list(range(8))
    config, store = run
    monkeypatch.setattr(usage.Budget, "on_step_end", steps(2))
    settings, sample = (
        replace(SETTINGS, prompts_per_step=3, answers_per_prompt=2, sampled_per_answer=5),
        Sampler._sample,
    )
    groups: list[list[str]] = []

    def recorded(self: Sampler, questions: list[str], trainer: Any) -> Any:
        groups.extend(questions[start : start + 10] for start in range(0, len(questions), 10))
        return sample(self, questions, trainer)

    monkeypatch.setattr(Sampler, "_sample", recorded)
    metadata = train_policy(VOWELS, settings, config, store)
    assert len(groups) == 6
    assert all(len(set(group)) == 1 for group in groups), "a group answers one question"
    assert metadata["answers"] == metadata["reward_calls"] == 2 * 3 * 2 * 5
    first, *_ = map(json.loads, store.read_bytes(f"{VOWELS.folder}/metrics.jsonl").decode().splitlines())
    assert first["sampled/divergence"] == pytest.approx(0, abs=1e-5), "before training it is the base model"
    assert abs(first["sampled/vowels"]) < 1 < first["rewards/vowels/std"], "standardised; the extremes vary more"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_policy_that_changes_answers_as_a_new_one(tmp_path: Path, device: str) -> None:
    base = load_base(str(write_base(tmp_path, eos_weight=1.0)), device=device)
    merged, plain = Merged(base, 4), deepcopy(base.model)
    requests = [Request("", base.chat("Why?"), params=SamplingParams(8, seed=n)) for n in range(6)]
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        deltas = {name: torch.randn_like(weight) / 4 for name, weight in linears(plain)}
        expected = deepcopy(plain)
        add_deltas(expected, deltas)
        choices = merged.decoder(deltas).answer(requests)
        alone = MixtureDecoder(base, [replace(base, model=expected)], 4).answer(requests)
        assert [choice.tokens for choice in choices] == [choice.tokens for choice in alone]
        assert [choice.divergence for choice in choices] == pytest.approx([choice.divergence for choice in alone])
        found.append([choice.tokens for choice in choices])
    assert found[0] != found[1] != found[2]


def linears(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those weights of a model that an adapter changes."""
    return [(name, weight) for name, weight in model.named_parameters() if "_proj" in name]


def test_several_objectives_share_one_reward(run: tuple[Config, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = run
    monkeypatch.setattr(usage.Budget, "on_step_end", steps(1))
    spec = PolicySpec("morlhf", RL, {"vowels": 0.25, "loud": 0.75}, 0.1)
    metadata = train_policy(spec, replace(SETTINGS, prompts_per_step=3, answers_per_prompt=6), config, store)
    assert metadata["reward_calls"] == 2 * metadata["answers"] == 36
    [entry, *_] = store.read_bytes(f"{spec.folder}/metrics.jsonl").decode().splitlines()
    found = json.loads(entry)
    parts = {"vowels": 0.25, "loud": 0.75, "divergence": -0.1}
    expected = sum(weight * found[f"rewards/{name}/mean"] for name, weight in parts.items())
    assert found["reward"] == pytest.approx(expected, abs=1e-4)


def test_dpo_raises_its_reward(run: tuple[Config, Store]) -> None:
    config, store = run
    spec = PolicySpec("dpo-vowels", DPO, {"vowels": 1.0}, 0.1)
    settings = replace(SETTINGS, pairs_per_prompt=4, pairs_per_step=8, epochs=3)
    assert len(fit.preference_pairs(spec, settings, config, store)) > 30
    metadata = train_policy(spec, settings, config, store)
    assert metadata["tokens"] == metadata["reward_calls"] == 0
    base, sd = load_base(config.base.model), scale_of(config, store, "vowels").sd
    policy = load_merged(config, store, {spec.name: 1.0})
    assert mean_vowels(config, policy, base) > mean_vowels(config, base, base) + 0.5 * sd


def test_pairs_come_from_training_prompts_only(run: tuple[Config, Store]) -> None:
    config, store = run
    base = load_base(config.base.model)
    known = {tuple(base.chat(prompt.text, config.base.system)) for prompt in training_prompts(config)}
    spec = PolicySpec("dpo-vowels", DPO, {"vowels": 1.0}, 0.1)
    assert {tuple(pair.prompt) for pair in fit.preference_pairs(spec, SETTINGS, config, store)} <= known


def test_a_killed_training_resumes_from_its_checkpoint(
    run: tuple[Config, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = run

    def killed(self: usage.Budget, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(usage.Budget, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        train_policy(VOWELS, SETTINGS, config, store)
    assert store.metadata(VOWELS.folder) is None
    monkeypatch.setattr(usage.Budget, "on_step_end", steps(4))
    metadata = train_policy(VOWELS, SETTINGS, config, store)
    assert metadata["steps"] == 4
    assert metadata["answers"] == 4 * 64
    assert train_policy(VOWELS, SETTINGS, config, store) == metadata


def test_the_budget_ends_training(run: tuple[Config, Store]) -> None:
    config, store = run
    metadata = train_policy(VOWELS, replace(SETTINGS, tokens=1), config, store)
    assert metadata["steps"] == 1
    assert metadata["seconds"] > 0


def test_the_learning_rate_falls_while_the_budget_is_spent(run: tuple[Config, Store]) -> None:
    config, store = run
    metadata = train_policy(VOWELS, replace(SETTINGS, tokens=4_000), config, store)
    lines = store.read_bytes(f"{VOWELS.folder}/{fit.HISTORY_FILE}").decode().splitlines()
    rates = [rate for line in lines if (rate := json.loads(line).get("learning_rate")) is not None]
    assert metadata["steps"] > 4
    assert rates[0] == SETTINGS.rl_learning_rate
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 2


def test_the_command_trains_what_is_named(
    run: tuple[Config, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = run
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    store.write_bytes(CONFIG_FILE, f"{settings}{LAST_LINE}\n".encode())
    (tmp_path / "config.yaml").write_text(settings)
    command = ["--config", str(tmp_path / "config.yaml"), "--policies", "dpo-*", "--dpo-kls", "0.5", "--rank", "4"]
    train.main([*command, "--list"])
    assert capsys.readouterr().out.split() == ["dpo-vowels-kl0.5", "dpo-loud-kl0.5"]
    train.main(command)
    assert store.list(FOLDER) == ["dpo-loud-kl0.5", "dpo-vowels-kl0.5"]
    with pytest.raises(SystemExit) as refused:
        train.main([*command, "--rank", "5"])
    assert refused.value.code == 2
    assert "--tag" in capsys.readouterr().err


class Scored:
    """Log-probabilities of the answers in a batch under an adapter, and gradients of a weighted sum of them."""

    def __init__(self, folder: Path):
        base = load_base(str(write_base(folder)), "float32")
        self.eos_ids = sorted(base.eos_ids)
        torch.manual_seed(0)
        self.model = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        add_fused_lm_head(self.model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        self.ids_BT = torch.randint(0, base.model.config.vocab_size, (3, 12))
        self.labels_BT = self.ids_BT.clone()
        self.labels_BT[:, :5] = self.labels_BT[1, 9:] = -100
        self.weights_BT = torch.randn(3, 11)

    def logits(self) -> torch.Tensor:
        """Of the tokens after the first, over the whole vocabulary."""
        logits_BTV: torch.Tensor = self.model(input_ids=self.ids_BT).logits[:, :-1]
        return logits_BTV

    def found(self) -> Any:
        mask_BT = torch.ones_like(self.ids_BT)
        return self.model(input_ids=self.ids_BT, attention_mask=mask_BT, labels=self.labels_BT, fused_lm_head=True)

    def gradients(self, found: Any) -> list[torch.Tensor]:
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return list(torch.autograd.grad((found.log_probs * self.weights_BT).sum(), trained))


def test_with_every_token_as_support_answers_are_scored_as_trl_scores_them(tmp_path: Path) -> None:
    """Prompts and padding left out, log-probabilities and gradients are the same."""
    scored = Scored(tmp_path)
    theirs = scored.found()
    their_gradients = scored.gradients(theirs)
    score_on_support(scored.model, SamplingParams(top_k=10_000), [])
    ours = scored.found()
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)
    torch.testing.assert_close(scored.gradients(ours), their_gradients)
    assert (ours.is_top1 == theirs.is_top1).all()
    assert (ours.log_probs[:, :4] == 0).all()


@pytest.mark.parametrize("is_reference", [False, True])
def test_answers_are_scored_on_the_support_of_the_base_model(tmp_path: Path, is_reference: bool) -> None:
    """By hand: top 4 of the base model without the end at the start of answers, and the token itself in any case."""
    scored = Scored(tmp_path)
    targets_BT = scored.labels_BT[:, 1:]
    with torch.no_grad(), scored.model.disable_adapter():
        base_BTV = scored.logits()
    policy_BTV = base_BTV if is_reference else scored.logits().detach()
    allowed_BTV = base_BTV.clone()
    allowed_BTV[:, 4, scored.eos_ids] = float("-inf")
    score_on_support(scored.model, SamplingParams(top_k=4), scored.eos_ids)
    with torch.no_grad(), scored.model.disable_adapter() if is_reference else nullcontext():
        found_BT = scored.found().log_probs
    num_outside = 0
    for row, place in (targets_BT != -100).nonzero().tolist():
        target = int(targets_BT[row, place])
        support = {*allowed_BTV[row, place].topk(4).indices.tolist(), target}
        num_outside += len(support) - 4
        right = policy_BTV[row, place, target] - policy_BTV[row, place, sorted(support)].logsumexp(0)
        torch.testing.assert_close(found_BT[row, place], right, rtol=1e-4, atol=1e-5)
    assert num_outside  # random tokens: some lie outside
    assert (found_BT[targets_BT == -100] == 0).all()
