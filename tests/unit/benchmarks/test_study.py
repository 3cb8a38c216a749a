"""The study compares gains at one KL, on the same prompts and the same trees. No Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import figures
from benchmarks.common.result_cache import EvaluatedModel, evaluated_model, result_path
from benchmarks.study import __main__ as study
from benchmarks.study import answers_by_beta, measure, value_error
from benchmarks.study.answers_by_beta import BASE, Setting
from benchmarks.study.equal_kl import AtKl, Curve, gains_at, resamples, summarise
from benchmarks.study.figures import Results, Row, StrengthResult, error_difference, middle
from benchmarks.study.page import findings, iteration_table, render, strength_table, variant_table
from benchmarks.study.value_error import HeldOut
from benchmarks.study.variants import VARIANTS, Variant, copy_stage, copy_trees
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.core.tree import ROOT, Finish, Tree, TreeBuilder
from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.evaluate.sweep import Estimate
from mavis_dist.prompts import load_prompts
from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.shards import Labels, write_labels, write_trees
from mavis_dist.train.data import Fit, data_of
from tests.fakes import tiny_base, tiny_value
from tests.tiny import write_models

WHOLE = resamples(1)


def curve(kl: list[float], gain: list[float]) -> Curve:
    """The same on a single prompt, so that means are these numbers."""
    return Curve(np.array(kl)[:, None], np.array(gain)[:, None])


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


# Gains at equal KL


@pytest.mark.parametrize(
    ("kl", "gain"),
    [(0.0, 0.0), (0.5, 1.0), (1.0, 2.0), (2.0, 2.5), (3.0, 3.0), (4.5, 2.0), (6.0, 1.0)],
)
def test_gains_are_read_off_the_lines_through_the_origin_and_the_strengths(kl: float, gain: float) -> None:
    assert gains_at(curve([1.0, 3.0, 6.0], [2.0, 3.0, 1.0]), kl, WHOLE) == pytest.approx([gain])


def test_a_kl_beyond_the_curve_is_not_reached() -> None:
    gain_R = gains_at(curve([1.0, 3.0], [2.0, 3.0]), 3.001, WHOLE)
    assert np.isnan(gain_R).all()
    assert summarise(gain_R).estimate is None


def test_where_more_strength_spends_less_the_first_crossing_counts() -> None:
    assert gains_at(curve([2.0, 1.0, 4.0], [1.0, 5.0, 8.0]), 1.5, WHOLE) == pytest.approx([0.75])
    assert gains_at(curve([2.0, 1.0, 4.0], [1.0, 5.0, 8.0]), 2.5, WHOLE) == pytest.approx([6.5])


def noisy(seed: int, num_prompts: int = 50) -> Curve:
    rng = np.random.default_rng(seed)
    return Curve(rng.uniform([[1.0], [3.0]], [[2.0], [5.0]], (2, num_prompts)), rng.normal(1, 1, (2, num_prompts)))


def test_the_interval_is_that_of_the_mean_over_prompts() -> None:
    """At a strength that every prompt spends the same KL at, the gain is a plain mean: mean ± 1.96 standard errors."""
    gain_P = np.random.default_rng(1).normal(0.3, 1.0, 200)
    flat = Curve(np.full((1, 200), 2.0), gain_P[None])
    at = summarise(gains_at(flat, 2.0, resamples(200)))
    assert at.estimate is not None
    assert at.reached == 1
    error = gain_P.std() / np.sqrt(200)
    assert at.estimate.mean == pytest.approx(gain_P.mean())
    assert at.estimate.high - at.estimate.mean == pytest.approx(1.96 * error, rel=0.1)
    assert at.estimate.mean - at.estimate.low == pytest.approx(1.96 * error, rel=0.1)


def test_every_resample_is_interpolated_separately() -> None:
    """By hand, with the prompts of one resample repeated as often as it drew them."""
    one, weights_RP = noisy(3), resamples(50)
    drawn = np.repeat(np.arange(50), np.rint(weights_RP[7] * 50).astype(int))
    assert len(drawn) == 50
    kl, gain = one.kl_SP[:, drawn].mean(1), one.gain_SP[:, drawn].mean(1)
    assert gains_at(one, 2.5, weights_RP)[7] == pytest.approx(np.interp(2.5, [0, *kl], [0, *gain]))


def test_differences_are_paired_by_prompt() -> None:
    """The variation that all value models share cancels, however much the prompts differ."""
    weights_RP = resamples(50)
    one = noisy(2)
    better = Curve(one.kl_SP, one.gain_SP + one.kl_SP)  # by one sd per nat
    ours, theirs = gains_at(better, 2.5, weights_RP), gains_at(one, 2.5, weights_RP)
    alone, difference = summarise(ours).estimate, summarise(ours - theirs).estimate
    assert alone is not None
    assert difference is not None
    assert alone.high - alone.low > 0.3
    assert [difference.mean, difference.low, difference.high] == pytest.approx([2.5] * 3)


def test_resamples_that_do_not_reach_the_kl_are_counted_and_left_out() -> None:
    one = noisy(4)
    kl = float(one.kl_SP[-1].mean())
    at = summarise(gains_at(one, kl, resamples(50)))
    assert at.estimate is not None
    assert 0.3 < at.reached < 0.7
    assert np.isfinite([at.estimate.low, at.estimate.high]).all()


def test_one_prompt_has_no_interval() -> None:
    at = summarise(gains_at(curve([1.0], [2.0]), 1.0, resamples(1)))
    assert at.estimate == Estimate(2.0, float("-inf"), float("inf"))


def test_errors_are_compared_tree_by_tree() -> None:
    reference = HeldOut([1.0, 8.0, 3.0], [1.0, 4.0, 2.0], 0.1)
    ours = HeldOut([e + w / 2 for e, w in zip(reference.error_T, reference.weight_T, strict=True)], [1.0, 4.0, 2.0], 0)
    assert reference.error == pytest.approx(12 / 7)
    difference = error_difference(ours, reference)
    assert difference is not None
    assert [difference.mean, difference.low, difference.high] == pytest.approx([0.5] * 3)
    assert error_difference(None, reference) is None


def test_the_middle_strength() -> None:
    assert [(1, 3, 6)[middle((1, 3, 6))], (1, 3, 6, 12)[middle((1, 3, 6, 12))], (5,)[middle((5,))]] == [3, 6, 5]


# Variants


def test_a_variant_changes_one_setting_and_the_name(tmp_path: Path) -> None:
    config = make_config(tmp_path, iterations=3, value={"layers": 4})
    for variant in VARIANTS:
        old, new = config_module.flatten(config), config_module.flatten(variant.config(config))
        changed = {key: new[key] for key in new if new[key] != old[key]}
        setting = f"{variant.section}.{variant.key}"
        assert changed == {"run": f"study-{variant.name}", "iterations": 1, setting: variant.value}
        assert config_module.parse(variant.config(config).model_dump(mode="json")).run == f"study-{variant.name}"
        assert not variant.is_new(variant.config(config))


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


def test_many_settings_at_once_are_each_setting_alone(tmp_path: Path) -> None:
    """Value models whose answers share a batch each apply their own tilt."""
    base = tiny_base(seed=1, eos_boost=1.0)
    models = {"a@0": tiny_value(1), "a@1": tiny_value(2)}
    prompts = [(5, 6, 7), (8, 9, 10, 11, 12), (13,)]
    settings = [BASE, *(Setting(name, beta) for name in models for beta in (2.0, 6.0))]
    common = answers_by_beta.template(make_config(tmp_path))
    together = dict(answers_by_beta.generate(Engine(base, LocalGuide(models)), settings, prompts, common))
    assert set(together) == set(settings)
    for setting in settings:
        guide = LocalGuide({setting.model: models[setting.model]}) if setting.model else None
        [(_, alone)] = answers_by_beta.generate(Engine(base, guide), [setting], prompts, common)
        assert [choice.tokens for choice in together[setting]] == [choice.tokens for choice in alone]
        assert sum(choice.divergence for choice in alone) == pytest.approx(sum(c.divergence for c in together[setting]))
    assert all(choice.divergence == 0 for choice in together[BASE])
    assert all(choice.divergence > 0 for choice in together[Setting("a@1", 6.0)])


def models_in(config: Config) -> list[EvaluatedModel]:
    store = Store(config.storage, config.run)
    return [evaluated_model(store, name, "0", "iteration 0") for name in config.objectives]


def test_stored_settings_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, "study", ("brief", "positive"))
    config = make_config(tmp_path)
    store, models = Store(config.storage, config.run), models_in(config)
    first = answers_by_beta.measure(config, store, models, (2.0,))
    assert set(first) == {BASE, Setting("brief@0", 2.0), Setting("positive@0", 2.0)}
    brief = first[Setting("brief@0", 2.0)]
    assert brief.reward["brief"] == [-len(text.split()) for text in brief.text]
    assert len(brief.text) == len(brief.divergence) == len(brief.num_tokens) == 4

    generated: list[Setting] = []
    generate = answers_by_beta.generate
    monkeypatch.setattr(
        answers_by_beta, "generate", lambda e, settings, p, c: generated.extend(settings) or generate(e, settings, p, c)
    )
    more = answers_by_beta.measure(config, store, models[:1], (2.0, 5.0))
    assert generated == [Setting("brief@0", 5.0)]
    assert more[BASE] == first[BASE]

    monkeypatch.setattr(answers_by_beta, "load_engine", lambda *_: pytest.fail("nothing is left to measure"))
    assert answers_by_beta.measure(config, store, models, (2.0,)) == first


def test_another_value_model_with_the_same_name_is_measured_again(tmp_path: Path) -> None:
    inputs = {"value_model": "1", "beta": 2.0}
    assert result_path("answers", "a", inputs) == result_path("answers", "a", dict(reversed(inputs.items())))
    assert result_path("answers", "a", inputs) != result_path("answers", "a", {**inputs, "value_model": "2"})


# Errors on held-out trees


def small_tree(prompt_id: str, seed: int) -> Tree:
    """Two segments from the prompt, the first with two children."""
    builder = TreeBuilder(prompt_id, "base", seed, [5, 6, 7])
    builder.add(ROOT, 0, [10 + seed, 11, 12], [0.0] * 3, Finish.OPEN)
    builder.add(ROOT, 0, [20, 21 + seed], [0.0] * 2, Finish.STOP)
    for token in (30, 31):
        builder.add(0, 3, [token, 32 + seed], [0.0] * 2, Finish.LENGTH)
    return builder.build()


def write_labelled_trees(config: Config) -> None:
    store = Store(config.storage, config.run)
    trees = [small_tree(prompt.id, seed) for seed, prompt in enumerate(load_prompts(config.prompts, config.seed)[0])]
    write_trees(store, "rollouts/base/part-00000.parquet", trees)
    scores = np.random.default_rng(0).normal(size=(len(trees), 3))
    labels = [Labels(tree.prompt_id, tree.leaves(), score) for tree, score in zip(trees, scores, strict=True)]
    write_labels(store, "labels/base/brief/part-00000.parquet", labels)


def test_errors_are_those_of_token_targets_for_every_variant(tmp_path: Path) -> None:
    write_models(tmp_path, "study", ("brief",))
    config = make_config(tmp_path)
    write_labelled_trees(config)
    store, one = Store(config.storage, config.run), evaluated_model(Store(config.storage, "study"), "brief", "0", "i0")
    measured = value_error.measure(config, store, one)
    assert measured is not None
    assert len(measured.error_T) == config.prompts.validation

    ids = frozenset(prompt.id for prompt in load_prompts(config.prompts, config.seed)[0][-3:])
    node = VARIANTS[0].config(config)
    of_nodes = value_error._measure(node, store, one, ids)
    assert of_nodes.error != pytest.approx(measured.error), "other targets, other errors"
    for path in (tmp_path / "runs/study/study/value_error").iterdir():
        path.unlink()
    assert value_error.measure(node.model_copy(update={"run": "study"}), store, one) == measured

    # R² follows from the error and the variance of the targets.
    _, trees = data_of(Fit("brief", 0, None, one.scale, ids), config, store)
    batch = trees.batch([0, 1, 2])
    weight, value = batch.weight_BX.double().numpy(), batch.value_BX.double().numpy()
    variance = np.average((value - np.average(value, weights=weight)) ** 2, weights=weight)
    assert measured.r2 == pytest.approx(1 - measured.error / variance, abs=1e-4)
    assert measured.errors(resamples(3))[0] == pytest.approx(measured.error)


def test_errors_stored_by_the_training_take_precedence(tmp_path: Path) -> None:
    config, store = make_config(tmp_path), Store(str(tmp_path), "study")
    one = EvaluatedModel("brief", "brief@0", "iteration 0", 0, tmp_path / "no such folder")
    store.finish("values/brief/i0", {"validation_error": 0.5, "explained_variance": 0.25})
    assert measure.errors(config, store, one) == (0.5, 0.25)


def test_all_figures_of_a_finished_run(tmp_path: Path) -> None:
    """Gains are compared at the KL of iteration 0 at the middle strength; equal weights give a difference of 0."""
    write_models(tmp_path, "study", ("brief", "positive"))
    config = make_config(tmp_path, prompts={"train": 6, "validation": 0, "evaluation": 4})
    same = Variant("same", "value", "layers", 1)
    write_models(tmp_path, "study-same", ("brief", "positive"))
    Store(config.storage, config.run).finish("gate/brief/i0", {"accepted": True})
    results = measure.measure(config, [same], (1.0, 3.0, 6.0))
    assert [row.label for row in results.iterations] == ["iteration 0"] * 2
    for row in results.iterations:
        assert results.kl[row.objective] == pytest.approx(row.strengths[1].divergence)
        assert row.gain.estimate is not None
        assert row.gain.estimate.mean == pytest.approx(row.strengths[1].gain.mean)
        assert (row.validation_error, row.r2) == (None, None)
    assert results.iterations[0].gate == {"accepted": True}
    changed = [row for row in results.variants if row.gain_over]
    assert [row.label for row in changed] == ["value.layers 1"] * 2
    for row in changed:
        difference = row.gain_over[measure.REFERENCE].estimate
        assert difference is not None
        assert [difference.mean, difference.low, difference.high] == pytest.approx([0.0] * 3)
    found = {**results.to_json(), **PROVENANCE}
    assert "| accepted |" in render(found)
    assert render(json.loads(json.dumps(found))) == render(found)


# The page


def made_up() -> Results:
    strengths = [
        StrengthResult(2.0, 1.5, 20.0, Estimate(0.4, 0.1, 0.7)),
        StrengthResult(6.0, 4.0, 18.0, Estimate(0.9, -0.1, 1.5)),
    ]
    first = Row("brief", "iteration 0", 0.81, 0.125, AtKl(Estimate(0.9, 0.2, 1.5), 1.0), {}, strengths)
    second = replace(
        first,
        label="iteration 1",
        gain=AtKl(Estimate(1.3, 0.8, 1.9), 0.9),
        gain_over={"iteration 0": AtKl(Estimate(0.4, 0.1, 0.7), 0.9)},
        gate={"accepted": False, "difference": -0.02, "low": -0.11, "high": 0.07},
    )
    third = replace(
        second,
        label="iteration 2",
        gain=AtKl(None, 0.2),
        gain_over={"iteration 0": AtKl(None, 0.2), "iteration 1": AtKl(None, 0.1)},
        gate=None,
    )
    reference = replace(first, label="as configured")
    variant = replace(
        first,
        label="train.targets node",
        gain_over={"as configured": AtKl(Estimate(-0.3, -0.6, -0.1), 1.0)},
        error_over=Estimate(0.05, 0.01, 0.09),
    )
    return Results({"base model": "tiny"}, {"brief": 4.0}, 6.0, [first, second, third], [reference, variant])


def figures_of(results: Results) -> dict[str, Any]:
    return {**results.to_json(), **PROVENANCE}


def test_the_tables_hold_the_figures_with_their_intervals() -> None:
    rows = iteration_table(made_up()).splitlines()[2:]
    assert rows == [
        "| brief | iteration 0 | 0.810 | 0.125 | 4.00 | +0.90 [+0.20, +1.50] | – | – | – |",
        "| brief | iteration 1 | 0.810 | 0.125 | 4.00 "
        "| +1.30 [+0.80, +1.90] (90% of the resamples reach the KL) "
        "| +0.40 [+0.10, +0.70] (90% of the resamples reach the KL) "
        "| +0.40 [+0.10, +0.70] (90% of the resamples reach the KL) | refused, −0.02 [−0.11, +0.07] |",
        "| brief | iteration 2 | 0.810 | 0.125 | 4.00 | KL not reached | KL not reached | KL not reached | – |",
    ]
    assert variant_table(made_up()).splitlines()[-1] == (
        "| brief | train.targets node | 0.810 | +0.05 [+0.01, +0.09] | 0.125 | 4.00 | +0.90 [+0.20, +1.50] "
        "| −0.30 [−0.60, −0.10] |"
    )
    strengths = strength_table(made_up()).splitlines()
    assert strengths[0] == "| objective | value model | beta 2 | beta 6 |"
    assert strengths[2] == "| brief | iteration 0 | +0.40 [+0.10, +0.70] at 1.50 | +0.90 [−0.10, +1.50] at 4.00 |"
    assert len(strengths) == 2 + 4, "the reference of the variants is iteration 0, which is there already"


def test_the_page_is_the_same_from_the_file_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unreached KLs (None), resampling shares and gates survive JSON."""
    found = figures_of(made_up())
    figures.write(tmp_path / "study.json", found)
    study.main(["--page-only", "--json", str(tmp_path / "study.json"), "--markdown", str(tmp_path / "page.md")])
    assert render(found) in (tmp_path / "page.md").read_text()
    assert capsys.readouterr().out == render(found) + "\n"
    rows = [line for line in render(found).splitlines() if line.startswith(("| command", "| base model", "| machine"))]
    assert rows == [
        "| command | `python -m benchmarks.study --config study.yaml` |",
        "| base model | tiny |",
        "| machine | a processor, 2 cores, 24 GiB; Python 3.11.7, torch 2.13.0 |",
    ]


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    widths: list[set[int]] = [set()]
    for line in render(figures_of(made_up())).splitlines():
        if line.startswith("|"):
            widths[-1].add(line.count("|"))
        elif widths[-1]:
            widths.append(set())
    assert [len(width) for width in widths] == [1] * 4 + [0]


def test_the_findings_count_the_intervals() -> None:
    gains, steps, changes, errors, gate, chance = findings(made_up())
    assert gains.startswith("Of 4 gains")
    assert "3 above 0" in gains
    assert "1 unknown because a curve does not reach the KL (brief, iteration 2)" in gains
    assert "1 above 0 (brief, iteration 1 over iteration 0 +0.40 [+0.10, +0.70])" in steps
    assert "(brief, iteration 2 over iteration 1)" in steps
    assert "1 below 0 (brief, train.targets node over as configured −0.30 [−0.60, −0.10])" in changes
    assert "1 above 0 (brief, train.targets node +0.05 [+0.01, +0.09])" in errors
    assert gate == "The gate accepted 0 of 1 iterations."
    assert "one in twenty" in chance


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
