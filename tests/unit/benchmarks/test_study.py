"""The study compares gains at one KL, as shares of the limit, on the same prompts and the same trees. No Ray."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import figures
from benchmarks.common.answers import Answers
from benchmarks.common.result_cache import EvaluatedModel, evaluated_model, result_path
from benchmarks.study import __main__ as study
from benchmarks.study import answers_by_beta, decode_speed, measure, plot, sibling_answers, text_quality, variants
from benchmarks.study.answers_by_beta import BASE, Setting
from benchmarks.study.decode_speed import DecodeSpeed
from benchmarks.study.figures import Cost, Measured, Results, Row, Steered, StrengthResult, Validation, nearest, row_of
from benchmarks.study.page import (
    cost_table,
    findings,
    iteration_table,
    point_table,
    render,
    strength_table,
    value_table,
)
from benchmarks.study.sibling_answers import BaseAnswers
from benchmarks.study.text_quality import Spread, TextRatios
from benchmarks.study.variants import VARIANTS, Variant, check_unseen, copy_stage, copy_trees
from mavis_dist import cluster, pipeline
from mavis_dist import config as config_module
from mavis_dist.compare.equal_kl import AtKl
from mavis_dist.config import Config
from mavis_dist.core import limit, siblings
from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.evaluate.sweep import Estimate, Limit
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base, load_tokenizer
from mavis_dist.store import layout, values
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.types import Policy, RewardScale, Stopped, UserError
from tests.fakes import tiny_base, tiny_states, tiny_value
from tests.tiny import write_models


def make_config(folder: Path, **sections: Any) -> Config:
    settings = {
        "run": "study",
        "storage": str(folder / "runs"),
        "iterations": 1,
        "objectives": {"brief": {"reward": "brevity"}, "positive": {"reward": "sentiment"}},
        "base": {"model": str(folder / "tiny-llama"), "dtype": "float32"},
        "prompts": {"train": 6, "validation": 3, "evaluation": 4},
        "rollout": {"max_tokens": 8, "first": {"root": 2, "children": 2, "layers": 2}, "cpus_per_actor": 1},
    }
    return config_module.parse({**settings, **sections})


PROVENANCE = {
    "command": "python -m benchmarks.study --config study.yaml",
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 24, "gpus": []},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}


# Shares of the limit


UNIT = RewardScale(0.0, 1.0)


def model(objective: str, label: str = "as configured") -> EvaluatedModel:
    return EvaluatedModel(objective, f"{objective}@{label}", label, 0, Path("no such folder"))


def steered(label: str = "as configured", **weights: float) -> Steered:
    return Steered(" + ".join(weights), label, tuple((model(name, label), w) for name, w in weights.items()))


def answers(kl_P: np.ndarray, **rewards: np.ndarray) -> Answers:
    reward = {name: reward_P.tolist() for name, reward_P in rewards.items()}
    return Answers([""] * len(kl_P), [3] * len(kl_P), kl_P.tolist(), reward)


def measured(kl: float, one: Steered, found: Sequence[Answers], **base_PN: np.ndarray) -> Measured:
    """Everything in units of the rewards, at strengths 1, 2, ...; a strength of exactly this KL reaches it."""
    betas = [float(beta) for beta in range(1, len(found) + 1)]
    by_setting = {one.setting(beta): answer for beta, answer in zip(betas, found, strict=True)}
    return Measured(by_setting, base_PN, dict.fromkeys(base_PN, UNIT), betas, kl - 1e-9)


def normal_policy(seed: int, kl: float, num_prompts: int = 60) -> tuple[np.ndarray, Answers]:
    """Base answers with normal rewards, and answers of the best policy at this KL: mean + sqrt(2 KL)."""
    rng = np.random.default_rng(seed)
    mean_P1 = rng.normal(size=(num_prompts, 1))
    base_PN = mean_P1 + rng.normal(size=(num_prompts, 64))
    reward_P = mean_P1[:, 0] + math.sqrt(2 * kl) + rng.normal(size=num_prompts)
    return base_PN, answers(np.full(num_prompts, kl), a=reward_P)


@pytest.mark.parametrize("kl", [0.5, 1.0])
def test_the_best_policy_has_the_whole_limit(kl: float) -> None:
    shares = []
    for seed in range(20):
        base_PN, best = normal_policy(seed, kl)
        share = row_of(measured(kl, steered(a=1.0), [best], a=base_PN), steered(a=1.0)).share.estimate
        assert share is not None
        shares.append(share)
    assert np.mean([share.mean for share in shares]) == pytest.approx(1.0, abs=0.08)
    assert sum(share.low < 1 < share.high for share in shares) >= 16  # 95 %, less chance


def test_a_share_is_the_gain_over_the_limit_and_agrees_with_the_evaluation() -> None:
    """At the very KL of a strength it is the share that the evaluation reports."""
    base_PN, best = normal_policy(3, 1.0)
    found = row_of(measured(1.0, steered(a=1.0), [best], a=base_PN), steered(a=1.0))
    gain_P = np.array(best.reward["a"]) - base_PN.mean(axis=1)
    expected = limit.share(gain_P, np.array(best.divergence), base_PN)
    assert expected is not None
    assert found.share.estimate is not None
    assert found.share.estimate.mean == pytest.approx(expected.mean, rel=1e-3)
    assert found.share.estimate.low == pytest.approx(expected.low, abs=0.02)
    assert found.share.estimate.high == pytest.approx(expected.high, abs=0.02)
    assert found.limit == pytest.approx(limit.gain_at(base_PN, 1.0), rel=1e-3)
    assert found.gain["a"].estimate is not None
    assert found.gain["a"].estimate.mean == pytest.approx(gain_P.mean())


def test_a_mixture_is_the_weighted_mean_of_its_gains_and_rewards() -> None:
    rng = np.random.default_rng(0)
    a_PN, b_PN, kl_P = rng.normal(size=(20, 64)), rng.normal(3, 2, size=(20, 64)), np.full(20, 1.0)
    rewards = {"a": rng.normal(1, 1, 20), "b": rng.normal(4, 1, 20)}
    mixture = steered(a=0.25, b=0.75)
    found = row_of(measured(1.0, mixture, [answers(kl_P, **rewards)], a=a_PN, b=b_PN), mixture)
    sums_PN, sum_P = 0.25 * a_PN + 0.75 * b_PN, 0.25 * rewards["a"] + 0.75 * rewards["b"]
    alone = row_of(measured(1.0, steered(c=1.0), [answers(kl_P, c=sum_P)], c=sums_PN), steered(c=1.0))
    assert found.share.estimate is not None
    assert alone.share.estimate is not None
    assert found.share.estimate.mean == pytest.approx(alone.share.estimate.mean)
    assert (found.share.estimate.low, found.share.estimate.high) == pytest.approx(
        (alone.share.estimate.low, alone.share.estimate.high)
    )
    for name, base_PN in (("a", a_PN), ("b", b_PN)):
        estimate = found.gain[name].estimate
        assert estimate is not None
        assert estimate.mean == pytest.approx((rewards[name] - base_PN.mean(axis=1)).mean())


def test_rewards_have_the_unit_of_the_reference() -> None:
    base_PN, best = normal_policy(1, 1.0)
    one = measured(1.0, steered(a=1.0), [best], a=base_PN)
    raw = answers(np.array(best.divergence), a=5 + 3 * np.array(best.reward["a"]))
    scaled = replace(one, answers={steered(a=1.0).setting(1.0): raw}, scales={"a": RewardScale(5.0, 3.0)})
    expected, found = row_of(one, steered(a=1.0)).share.estimate, row_of(scaled, steered(a=1.0)).share.estimate
    assert expected is not None
    assert found is not None
    assert found.mean == pytest.approx(expected.mean)


@pytest.mark.parametrize("kl", [limit.largest_divergence(64) + 0.01, 5.0, limit.MIN_DIVERGENCE / 2])
def test_without_a_known_limit_there_is_a_gain_and_no_share(kl: float) -> None:
    base_PN, best = normal_policy(1, 4.0)
    stronger = replace(best, divergence=[6.0] * 60)
    found = row_of(measured(kl, steered(a=1.0), [best, stronger], a=base_PN), steered(a=1.0))
    assert found.share.estimate is None
    assert found.limit is None
    assert found.weighted_gain.estimate is not None


def test_a_kl_that_is_not_reached_has_neither() -> None:
    base_PN, best = normal_policy(1, 1.0)
    found = row_of(measured(1.5, steered(a=1.0), [best], a=base_PN), steered(a=1.0))
    assert found.share.estimate is None
    assert found.weighted_gain.estimate is None
    assert found.limit == pytest.approx(limit.gain_at(base_PN, 1.5), rel=1e-3)


def test_equally_good_answers_have_no_limit_to_share() -> None:
    _, best = normal_policy(1, 1.0)
    found = row_of(measured(1.0, steered(a=1.0), [best], a=np.zeros((60, 64))), steered(a=1.0))
    assert found.share.estimate is None


def test_the_nearest_strength() -> None:
    assert nearest(made_up().points[0], 2.0).beta == 2.0
    assert nearest(made_up().points[0], 3.5).beta == 6.0


# Variants
# Variants


def delivered_config(*overrides: str) -> Config:
    return config_module.load(str(Path(__file__).parents[3] / "jobs/configs/study.yaml"), overrides)


def test_a_variant_changes_its_settings_and_the_name() -> None:
    config = delivered_config("iterations=3")
    for variant in VARIANTS:
        old, new = config_module.flatten(config), config_module.flatten(variant.config(config))
        changed = {key for key in new if new[key] != old[key]}
        assert changed - {"run", "iterations"} == variant.changed(config)
        assert all(key.startswith(tuple(variant.settings)) for key in variant.changed(config))
        assert len(variant.changed(config)) >= len(variant.settings)
        assert (new["run"], new["iterations"]) == (f"study-{variant.name}", 1)
        assert not variant.changed(variant.config(config))
    several = Variant("x", {"train.epochs": 7, "rollout.first": {"root": 3, "children": 2, "layers": 1}})
    assert several.changed(config) == {"train.epochs", "rollout.first.root", "rollout.first.layers"}
    assert several.label == "train.epochs 7, rollout.first 3/2/1"


def test_variants_that_change_prompts_or_trees_sample_their_own() -> None:
    config = delivered_config()
    assert [variant.name for variant in VARIANTS if variant.has_own_trees(config)] == ["small-trees", "large-trees"]


def test_a_variant_must_not_train_on_evaluation_prompts(tmp_path: Path) -> None:
    more = Variant("more", {"prompts.train": 8})
    config = make_config(tmp_path)
    check_unseen(config, more.config(config))  # the built-in prompts have a split for evaluation
    rows = [json.dumps({"prompt": f"question {n}"}) for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    source = {"source": str(tmp_path / "prompts.jsonl"), "train": 6, "validation": 3, "evaluation": 4}
    shared = make_config(tmp_path, prompts=source)
    check_unseen(shared, Variant("fewer", {"prompts.train": 5}).config(shared))
    with pytest.raises(UserError, match="contains 2 of the evaluation prompts"):
        check_unseen(shared, more.config(shared))


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"train.epochs": 1}, ["open", "copy", "fit", "release"]),
        ({"prompts.train": 5}, ["open", "grow", "label", "fit", "release"]),
    ],
)
def test_a_variant_learns_from_copied_or_own_trees(
    settings: dict[str, Any], stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages of the pipeline, each of iteration 0 of the base model's policy."""
    from mavis_dist import pipeline

    done: list[str] = []

    class State:
        def release_workers(self) -> None:
            done.append("release")

    def stage(name: str) -> Callable[..., None]:
        def record(_: State, iteration: int, policies: Sequence[Policy] = (Policy(),)) -> None:
            assert (iteration, list(policies)) == (0, [Policy()])
            done.append(name)

        return record

    for name in ("grow", "label", "fit"):
        monkeypatch.setattr(pipeline, name, stage(name))
    monkeypatch.setattr(pipeline, "open_run", lambda _: done.append("open") or State())
    monkeypatch.setattr(variants, "copy_trees", lambda *_: done.append("copy"))
    variants.train(make_config(tmp_path, iterations=2), Variant("x", settings))
    assert done == stages


def finished_stage(store: Store, folder: str) -> None:
    store.write_bytes(f"{folder}/part-00000.parquet", b"first")
    store.write_bytes(f"{folder}/part-00001.parquet", b"second")
    store.finish(folder, {"trees": 2})


def test_copied_stages_are_complete_and_finished(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    source = Store(config.storage, config.run)
    folders = ["rollouts/base", "labels/base/brief", "labels/base/positive"]
    for folder in folders:
        finished_stage(source, folder)
    variant = VARIANTS[0].config(config)
    copy_trees(config, variant)
    target = Store(variant.storage, variant.run)
    for folder in folders:
        assert target.list(folder) == source.list(folder)
        assert target.metadata(folder) == {"trees": 2}
        assert target.read_bytes(f"{folder}/part-00001.parquet") == b"second"


def test_an_unfinished_stage_is_not_copied_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    source, target = Store(str(tmp_path), "a"), Store(str(tmp_path), "b")
    source.write_bytes("rollouts/base/part-00000.parquet", b"begun")
    with pytest.raises(StoreError, match="not finished"):
        copy_stage(source, target, "rollouts/base")
    finished_stage(target, "rollouts/base")
    copy_stage(source, target, "rollouts/base")
    assert target.read_bytes("rollouts/base/part-00000.parquet") == b"first"


def test_a_copy_that_was_interrupted_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Store(str(tmp_path), "a"), Store(str(tmp_path), "b")
    finished_stage(source, "rollouts/base")
    write, written = target.write_bytes, []

    def full_disk(path: str, data: bytes) -> None:
        if written:
            raise OSError("no space left")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(target, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        copy_stage(source, target, "rollouts/base")
    monkeypatch.undo()
    assert target.metadata("rollouts/base") is None
    copy_stage(source, target, "rollouts/base")
    assert target.list("rollouts/base") == [MARKER, "part-00000.parquet", "part-00001.parquet"]


# Answers


def alone(name: str, beta: float) -> Setting:
    return Setting(((name, 1.0),), beta)


def test_many_settings_at_once_are_each_setting_alone(tmp_path: Path) -> None:
    """Value models whose answers share a batch each apply their own tilt."""
    base = tiny_base(seed=1, eos_boost=1.0)
    models = {"a@0": tiny_value(1), "a@1": tiny_value(2)}
    prompts = [(5, 6, 7), (8, 9, 10, 11, 12), (13,)]
    both = (("a@0", 0.25), ("a@1", 0.75))
    settings = [BASE, Setting(both, 3.0), *(alone(name, beta) for name in models for beta in (2.0, 6.0))]
    common = answers_by_beta.template(make_config(tmp_path))
    together = dict(answers_by_beta.generate(Engine(base, LocalGuide(models)), settings, prompts, common))
    assert set(together) == set(settings)
    for setting in settings:
        guide = LocalGuide({name: models[name] for name, _ in setting.weights}) if setting.weights else None
        [(_, single)] = answers_by_beta.generate(Engine(base, guide), [setting], prompts, common)
        assert [choice.tokens for choice in together[setting]] == [choice.tokens for choice in single]
        divergence = sum(choice.divergence for choice in together[setting])
        assert sum(choice.divergence for choice in single) == pytest.approx(divergence)
    assert all(choice.divergence == 0 for choice in together[BASE])
    assert all(choice.divergence > 0 for choice in together[alone("a@1", 6.0)])
    assert all(choice.divergence > 0 for choice in together[Setting(both, 3.0)])


def models_in(config: Config) -> list[EvaluatedModel]:
    store = Store(config.storage, config.run)
    return [evaluated_model(store, name, "0", "iteration 0") for name in config.objectives]


def test_stored_settings_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, "study", ("brief", "positive"))
    config = make_config(tmp_path)
    store, models = Store(config.storage, config.run), models_in(config)
    settings = [BASE, alone("brief@0", 2.0), Setting((("brief@0", 0.5), ("positive@0", 0.5)), 2.0)]
    first = answers_by_beta.measure(config, store, models, settings)
    assert list(first) == settings
    brief = first[alone("brief@0", 2.0)]
    assert brief.reward["brief"] == [-len(text.split()) for text in brief.text]
    assert len(brief.text) == len(brief.divergence) == len(brief.num_tokens) == 4

    generated: list[Setting] = []
    generate = answers_by_beta.generate
    monkeypatch.setattr(
        answers_by_beta, "generate", lambda e, settings, p, c: generated.extend(settings) or generate(e, settings, p, c)
    )
    more = answers_by_beta.measure(config, store, models[:1], [BASE, alone("brief@0", 2.0), alone("brief@0", 5.0)])
    assert generated == [alone("brief@0", 5.0)]
    assert more[BASE] == first[BASE]

    monkeypatch.setattr(answers_by_beta, "load_engine", lambda *_: pytest.fail("nothing is left to measure"))
    assert answers_by_beta.measure(config, store, models, settings) == first


def test_another_value_model_with_the_same_name_is_measured_again(tmp_path: Path) -> None:
    inputs = {"value_model": "1", "beta": 2.0}
    assert result_path("answers", "a", inputs) == result_path("answers", "a", dict(reversed(inputs.items())))
    assert result_path("answers", "a", inputs) != result_path("answers", "a", {**inputs, "value_model": "2"})


# A finished run


METADATA = {"explained_variance": 0.25, siblings.CEILING_KEY: 0.5}


def finish_run(folder: Path, run: str, objectives: tuple[str, ...], num_answers: int = 16) -> None:
    """A run as the pipeline leaves it, as far as the study reads it."""
    write_models(folder, run, objectives)
    store = Store(str(folder / "runs"), run)
    rng = np.random.default_rng(0)
    for name in objectives:
        store.finish(layout.value_folder(name, 0), METADATA)
        rewards = layout.limit_reward_folder(name)
        store.write_json(f"{rewards}/by_prompt.json", rng.normal(size=(4, num_answers)).tolist())
        store.finish(rewards, {"answers": num_answers})
    texts = [[f"answer {p} {n % 3} of the base" for n in range(num_answers)] for p in range(4)]
    store.write_json(f"{layout.LIMIT_FOLDER}/by_prompt.json", texts)
    store.finish(layout.LIMIT_FOLDER, {"answers": num_answers})


OBJECTIVES = ("brief", "positive", "relevant")


def study_config(folder: Path) -> Config:
    """`relevant` is a rule as well: no embedding model is needed."""
    rewards = zip(OBJECTIVES, ("brevity", "sentiment", "brevity"), strict=True)
    objectives = {name: {"reward": reward} for name, reward in rewards}
    prompts = {"train": 6, "validation": 0, "evaluation": 4}
    return make_config(folder, objectives=objectives, prompts=prompts, evaluate={"limit_answers": 16})


def test_the_whole_command_on_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners, mixtures, a variant with equal weights, text, file, page and plot; a second time nothing is computed."""
    from mavis_dist import cluster, pipeline

    same = Variant("same", {"value.layers": 1})
    finish_run(tmp_path, "study", OBJECTIVES)
    finish_run(tmp_path, "study-same", OBJECTIVES)
    trained: list[str] = []
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(pipeline, "run", lambda config: trained.append(config.run))
    monkeypatch.setattr(variants, "train", lambda _, variant: trained.append(variant.name))
    monkeypatch.setattr(variants, "VARIANTS", (same, Variant("no-change", {"iterations": 1})))
    (tmp_path / "study.yaml").write_text(json.dumps(study_config(tmp_path).model_dump(mode="json")))
    line = ["--config", str(tmp_path / "study.yaml"), "--json", str(tmp_path / "values.json")]
    line += ["--markdown", str(tmp_path / "page.md"), "--betas", "1,3,9", "--kl", "0.5"]
    study.main(line)
    assert trained == ["study", "same"]

    found = json.loads((tmp_path / "values.json").read_text())
    pairs = [f"{w} {a} + {1 - w} {b}" for a, b in (OBJECTIVES[:2], OBJECTIVES[::2], OBJECTIVES[1:]) for w in WEIGHTS]
    names = [*OBJECTIVES, *pairs, "1/3 brief + 1/3 positive + 1/3 relevant"]
    assert list(found["share_of_limit"]) == list(found["gain"]) == list(found["text"]) == names
    for name in names:
        share, gains = found["share_of_limit"][name], found["gain"][name]
        assert (share["kl"], share["num_prompts"]) == (0.5, 4)
        assert list(gains) == list(OBJECTIVES)
        assert share["value"] is not None, name
        assert share["low"] <= share["value"] <= share["high"]
    assert found["r2"] == dict.fromkeys(OBJECTIVES, 0.25)
    assert found["r2_ceiling"] == dict.fromkeys(OBJECTIVES, 0.5)
    assert found["sibling_slope"] == found["sibling_corr"] == {name: {} for name in OBJECTIVES}, "too few prompts"
    results = figures.parse(Results, found)
    assert [row.label for row in results.variants] == ["value.layers 1"] * 3
    for row in results.variants:
        difference = row.gain_over[measure.REFERENCE].estimate
        assert difference is not None
        # Estimated divergences differ by rounding where other rows run beside.
        assert [difference.mean, difference.low, difference.high] == pytest.approx([0.0] * 3, abs=1e-6)
    assert list(results.costs) == [measure.REFERENCE, "value.layers 1"]
    for cost in results.costs.values():
        assert cost.speed.tokens_per_s > 0
        assert cost.speed.over_unguided > 0
    assert results.iterations == []
    assert "## Iterations" not in (tmp_path / "page.md").read_text()
    assert "](values.svg)" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "values.svg").stat().st_size < 200_000

    monkeypatch.setattr(answers_by_beta, "load_engine", lambda *_: pytest.fail("nothing is left to measure"))
    monkeypatch.setattr(text_quality, "load_base", lambda *_: pytest.fail("nothing is left to measure"))
    monkeypatch.setattr(decode_speed, "load_engine", lambda *_: pytest.fail("nothing is left to measure"))
    study.main(line)
    assert json.loads((tmp_path / "values.json").read_text()) == found


WEIGHTS = (0.75, 0.5, 0.25)


def test_gains_are_over_the_mean_of_the_base_answers_that_tell_the_limit(tmp_path: Path) -> None:
    finish_run(tmp_path, "study", ("brief", "positive"))
    config = make_config(tmp_path, evaluate={"limit_answers": 16})
    store = Store(config.storage, config.run)
    found = measure.measure(config, [], (2.0, 6.0), 0.5)
    model = evaluated_model(store, "brief", "0", "")
    [answer] = answers_by_beta.measure(config, store, [model], [alone("brief@0", 6.0)]).values()
    base_PN = np.array(store.read_json("eval/limit/rewards/brief/by_prompt.json"))
    expected = np.array(answer.reward["brief"]) - base_PN.mean(axis=1)
    assert found.points[0].strengths[1].gain["brief"].mean == pytest.approx(expected.mean())
    assert found.points[0].strengths[1].divergence == pytest.approx(np.mean(answer.divergence))


@pytest.mark.parametrize("kind", ["model", "states"])
def test_siblings_are_the_base_answers_to_a_prompt(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer on its own, up to the token that is compared; shorter ones with their end."""
    finish_run(tmp_path, "study", ("brief",))
    config, source = make_config(tmp_path), np.random.default_rng(3)
    store, tokenizer = Store(config.storage, config.run), load_tokenizer(config.base.model)
    base = load_base(config.base.model)
    if kind == "states":
        put_on_states(store, "brief", base, tmp_path / "states")
    model = evaluated_model(store, "brief", "0", "")
    words = ["one", "two", "three", "four", "a", "b"]
    texts = [[" ".join(source.choice(words, size=n)) for n in (1, 2, 3, 6, 12)] for _ in range(9)]
    prompts = [tuple(source.integers(5, 50, size=4).tolist()) for _ in range(9)]
    rewards_PN = source.normal(size=(9, 5))
    found = sibling_answers.measure(config, store, model, BaseAnswers(prompts, texts, {"brief": rewards_PN}))

    loaded, _ = value.load(model.folder, base=base)
    for num_tokens in (1, 4):
        products = np.zeros(3)
        for prompt, row, rewards in zip(prompts, texts, rewards_PN, strict=True):
            values = []
            for text in row:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"][:8]
                ids = ids if len(ids) == 8 else [*ids, tokenizer.eos_token_id]
                values.append(float(loaded(input_ids=torch.tensor([[*prompt, *ids[:num_tokens]]]))[0, -1, 0]))
            v, y = np.array(values) - np.mean(values), rewards - rewards.mean()
            products += [v @ y, v @ v, y @ y]
        test = found[num_tokens]
        assert test.slope.value == pytest.approx(products[0] / products[1], rel=1e-3)
        assert test.correlation.value == pytest.approx(products[0] / np.sqrt(products[1] * products[2]), rel=1e-3)
        assert test.correlation.low < test.correlation.value < test.correlation.high
    monkeypatch.setattr(value, "load", lambda *_: pytest.fail("nothing is left to measure"))
    assert sibling_answers.measure(config, store, model, BaseAnswers(prompts, texts, {"brief": rewards_PN})) == found


def put_on_states(store: Store, name: str, base: BaseModel, work: Path) -> None:
    """Replace a value model by a head on the base model's states."""
    card = replace(value.load_card(values.fetch(store, name, 0)), state_layer=1)
    value.save(tiny_states(base, 3), card, work)
    store.upload(work, layout.value_folder(name, 0), {})


def test_speeds_are_those_of_answers_steered_by_all_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_run(tmp_path, "study", ("brief", "positive"))
    config, asked = make_config(tmp_path), []
    store, prompts = Store(config.storage, config.run), [(5, 6, 7), (8, 9)]
    models = [evaluated_model(store, name, "0", "") for name in ("brief", "positive")]
    engine = decode_speed.load_engine(config, models)[1]
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda requests: asked.append(requests) or generate(requests))
    monkeypatch.setattr(decode_speed, "load_engine", lambda *_: (None, engine))
    found = decode_speed.measure(config, store, "both", models, prompts)
    assert found.tokens_per_s > 0
    assert {tuple(request.weights.items()) for requests in asked for request in requests} == {
        (),
        (("brief@0", 0.5), ("positive@0", 0.5)),
    }
    seeds = [tuple(request.params.seed for request in requests) for requests in asked if not requests[0].weights]
    assert len(set(seeds[1:])) == len(seeds[1:]) == decode_speed.REPETITIONS, "every repetition has its own answers"
    assert decode_speed.measure(config, store, "both", models, prompts) == found
    assert len(asked) == 2 + 2 * decode_speed.REPETITIONS, "a stored speed is read"


def test_a_signal_stops_the_training_of_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(state: Any, iteration: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        cluster.check_stop()
        pytest.fail("the training went on")

    released = []
    state = SimpleNamespace(release_workers=lambda: released.append(True))
    monkeypatch.setattr(pipeline, "open_run", lambda _: state)
    monkeypatch.setattr(pipeline, "fit", fit)
    monkeypatch.setattr(variants, "copy_trees", lambda *_: None)
    [variant] = variants.chosen(["one-epoch"])
    with pytest.raises(Stopped):
        variants.train(make_config(tmp_path), variant)
    assert released


def test_unknown_variants_are_refused_by_name() -> None:
    assert [variant.name for variant in variants.chosen(["8-layers", "one-epoch"])] == ["one-epoch", "8-layers"]
    assert variants.chosen(()) == []
    assert variants.chosen(None) == list(VARIANTS)
    with pytest.raises(UserError, match=r"there is no 'tow-epochs'; there are separate, "):
        variants.chosen(["tow-epochs"])


def test_iterations_have_rows_with_the_decision_of_the_gate(tmp_path: Path) -> None:
    from tests.tiny import publish_next

    finish_run(tmp_path, "study", ("brief",))
    for iteration in (1, 2):
        publish_next(tmp_path, "study", "brief", iteration, seed=iteration)
    config = make_config(
        tmp_path, iterations=3, objectives={"brief": {"reward": "brevity"}}, evaluate={"limit_answers": 16}
    )
    Store(config.storage, config.run).finish("gate/brief/i1", {"accepted": True})
    results = measure.measure(config, [], (1.0, 6.0), 0.2)
    assert [row.label for row in results.iterations] == ["iteration 0", "iteration 1", "iteration 2"]
    assert [list(row.gain_over) for row in results.iterations] == [[], ["iteration 0"], ["iteration 0", "iteration 1"]]
    assert results.iterations[1].gate == {"accepted": True}
    assert results.iterations[0].weighted_gain == results.points[0].weighted_gain, "the reference is iteration 0"
    assert "| accepted |" in render(figures_of(results), "plot.svg")


def test_without_answers_that_tell_the_limit_the_study_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, evaluate={"limit_answers": 0})
    with pytest.raises(UserError, match=r"'evaluate.limit_answers' is 0.*set it to 64"):
        study.run(config, (1.0,), 2.0)


def test_answers_that_are_not_finished_are_named(tmp_path: Path) -> None:
    finish_run(tmp_path, "study", ("brief", "positive"), num_answers=8)
    with pytest.raises(StoreError, match="eval/limit/rewards/brief is not finished"):
        measure.measure(make_config(tmp_path, evaluate={"limit_answers": 16}), [], (1.0,), 0.5)


# The page


def made_up() -> Results:
    strengths = [
        StrengthResult(2.0, 1.5, 20.0, {"brief": Estimate(0.4, 0.1, 0.7)}, Estimate(0.4, 0.1, 0.7)),
        StrengthResult(6.0, 4.0, 18.0, {"brief": Estimate(0.9, -0.1, 1.5)}, Estimate(0.9, -0.1, 1.5)),
    ]
    gain = AtKl(Estimate(0.9, 0.2, 1.5), 1.0)
    found = Validation(
        0.125, 0.5, {1: Estimate(1.2, 0.3, 2.1)}, {1: Estimate(0.1, -0.1, 0.3), 8: Estimate(0.4, 0.2, 0.6)}
    )
    reference = Row(
        name="brief",
        label="as configured",
        share=AtKl(Estimate(0.6, 0.2, 1.0), 1.0),
        limit=1.5,
        gain={"brief": gain},
        weighted_gain=gain,
        gain_over={},
        strengths=strengths,
        validation=found,
    )
    variant = replace(
        reference,
        label="train.targets node",
        share=AtKl(None, 1.0),
        gain_over={"as configured": AtKl(Estimate(-0.3, -0.6, -0.1), 1.0)},
        validation=Validation(),
    )
    first = replace(reference, label="iteration 0")
    second = replace(
        first,
        label="iteration 1",
        weighted_gain=AtKl(Estimate(1.3, 0.8, 1.9), 0.9),
        gain_over={"iteration 0": AtKl(Estimate(0.4, 0.1, 0.7), 0.9)},
        gate={"accepted": False, "difference": -0.02, "low": -0.11, "high": 0.07},
    )
    third = replace(
        second,
        label="iteration 2",
        weighted_gain=AtKl(None, 0.2),
        gain_over={"iteration 0": AtKl(None, 0.2), "iteration 1": AtKl(None, 0.1)},
        gate=None,
    )
    return Results(
        conditions={"base model": "tiny"},
        kl=2.0,
        num_prompts=9,
        limits={"brief": Limit([0.0, 2.0], [0.0, 1.5])},
        points=[reference],
        variants=[variant],
        iterations=[first, second, third],
        costs={
            "as configured": Cost(431.4, DecodeSpeed(240.2, 0.512)),
            "train.targets node": Cost(None, DecodeSpeed(99.6, 0.2)),
        },
        text={"brief": TextRatios(2.0, 1.5, 1.02, None, 0.9)},
        text_base={
            "distinct_2": Spread(0.8, 0.04),
            "repetition": Spread(0.0, 0.0),
            "perplexity": Spread(5.0, 0.5),
        },
    )


def figures_of(results: Results) -> dict[str, Any]:
    return {**results.to_json(), **PROVENANCE}


def test_the_tables_hold_the_figures_with_their_intervals() -> None:
    assert point_table(made_up()).splitlines()[2:] == [
        "| brief | 2.00 | 0.60 [0.20, 1.00] | 1.50 | +0.90 [+0.20, +1.50] |"
    ]
    assert value_table(made_up()).splitlines()[2:] == [
        "| brief | as configured | 0.60 [0.20, 1.00] | +0.90 [+0.20, +1.50] | – | 0.12 of 0.50 | 0.10 [−0.10, 0.30] "
        "| 0.40 [0.20, 0.60] | 1.20 [0.30, 2.10] |",
        "| brief | train.targets node | – | +0.90 [+0.20, +1.50] | −0.30 [−0.60, −0.10] | – | – | – | – |",
    ]
    assert iteration_table(made_up()).splitlines()[2:] == [
        "| brief | iteration 0 | 0.12 | 0.60 [0.20, 1.00] | +0.90 [+0.20, +1.50] | – | – | – |",
        "| brief | iteration 1 | 0.12 | 0.60 [0.20, 1.00] "
        "| +1.30 [+0.80, +1.90] (90% of the resamples reach the KL) "
        "| +0.40 [+0.10, +0.70] (90% of the resamples reach the KL) "
        "| +0.40 [+0.10, +0.70] (90% of the resamples reach the KL) | refused, −0.02 [−0.11, +0.07] |",
        "| brief | iteration 2 | 0.12 | 0.60 [0.20, 1.00] | KL not reached | KL not reached | KL not reached | – |",
    ]
    assert cost_table(made_up()).splitlines()[2:] == [
        "| as configured | 431 | 240 | 0.51 |",
        "| train.targets node | – | 100 | 0.20 |",
    ]
    strengths = strength_table(made_up()).splitlines()
    assert strengths[0] == "| weights | value models | beta 2 | beta 6 |"
    assert strengths[2] == "| brief | as configured | +0.40 [+0.10, +0.70] at 1.50 | +0.90 [−0.10, +1.50] at 4.00 |"
    assert len(strengths) == 2 + 4, "iteration 0 is the reference, which is there already"


def test_the_page_is_the_same_from_the_file_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unreached KLs (None), resampling shares and gates survive JSON."""
    found = figures_of(made_up())
    figures.write(tmp_path / "figures/values.json", found)
    line = ["--json", str(tmp_path / "figures/values.json"), "--markdown", str(tmp_path / "page.md")]
    study.main(["--page-only", *line])
    page = render(found, "figures/values.svg")
    assert page in (tmp_path / "page.md").read_text()
    assert capsys.readouterr().out == page + "\n"
    assert (tmp_path / "figures/values.svg").exists()
    rows = [line for line in page.splitlines() if line.startswith(("| command", "| base model |", "| machine"))]
    assert rows == [
        "| command | `python -m benchmarks.study --config study.yaml` |",
        "| base model | tiny |",
        "| machine | a processor, 2 cores, 24 GiB; Python 3.11.7, torch 2.13.0 |",
    ]


def test_the_file_begins_with_the_main_figures() -> None:
    found = made_up().to_json()
    assert found["share_of_limit"] == {"brief": {"value": 0.6, "low": 0.2, "high": 1.0, "kl": 2.0, "num_prompts": 9}}
    assert found["gain"] == {"brief": {"brief": {"value": 0.9, "low": 0.2, "high": 1.5}}}
    unknown = replace(made_up().points[0], share=AtKl(None, 0.0), weighted_gain=AtKl(Estimate(1, -np.inf, np.inf), 0.0))
    found = replace(made_up(), points=[unknown]).to_json()
    assert found["share_of_limit"]["brief"]["value"] is None


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    widths: list[set[int]] = [set()]
    for line in render(figures_of(made_up()), "plot.svg").splitlines():
        if line.startswith("|"):
            widths[-1].add(line.count("|"))
        elif widths[-1]:
            widths.append(set())
    assert [len(width) for width in widths] == [1] * 7 + [0]


def test_the_findings_count_the_intervals() -> None:
    shares, gains, changes, steps, text, gate, chance = findings(made_up())
    assert shares == (
        "Of 1 corners and mixtures, 1 have a share of the limit, from 0.60 (brief) to 0.60 (brief); 1 reach half of it."
    )
    assert gains.startswith("Of 4 gains")
    assert "3 above 0" in gains
    assert "1 unknown because a curve does not reach the KL (brief, iteration 2)" in gains
    assert "1 above 0 (brief, iteration 1 over iteration 0 +0.40 [+0.10, +0.70])" in steps
    assert "(brief, iteration 2 over iteration 1)" in steps
    assert "1 below 0 (brief, train.targets node over as configured −0.30 [−0.60, −0.10])" in changes
    assert text == (
        "Of 2 figures of the text, 1 are within 5 % of the base model's; 1 are not (perplexity of brief 0.90)."
    )
    assert gate == "The gate accepted 0 of 1 iterations."
    assert "one in twenty" in chance


def test_the_plot_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot.write(made_up(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "train.targets node" in (tmp_path / "a.svg").read_text()


# The command line


@pytest.mark.parametrize("betas", ["", "2,x", "0,2", "2,inf", "-1"])
def test_invalid_strengths_are_refused(betas: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        study.main(["--config", "any", f"--betas={betas}"])
    assert end.value.code == 2
    assert repr(betas) in capsys.readouterr().err


def test_strengths_are_sorted() -> None:
    assert study._betas("6,1,3,3") == (1.0, 3.0, 6.0)


def test_a_missing_config_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        study.main(["--config", "no-such-file.yaml"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: config file 'no-such-file.yaml' does not exist")


@pytest.mark.parametrize("kl", ["0", "-1", "inf", "nan", "x"])
def test_an_invalid_kl_is_refused(kl: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        study.main(["--config", "any", f"--kl={kl}"])
    assert end.value.code == 2
    assert repr(kl) in capsys.readouterr().err
