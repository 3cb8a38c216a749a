"""Steerability measures each setting once, stores it, and summarises the answers correctly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import figures
from benchmarks.common.answers import Answers
from benchmarks.common.markdown import write_part
from benchmarks.steerability import __main__ as steerability
from benchmarks.steerability import answers, fronts
from benchmarks.steerability.answers import MATO, PARAMS, PERSONAL, PLAIN, PROMPTED, TRAINED, Measured, Setting, setting
from benchmarks.steerability.first_person import first_person
from benchmarks.steerability.page import render
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.store.files import Store
from mavis_dist.types import RewardScale, UserError
from tests.tiny import write_models

PAIR, WEIGHTS = ("brief", "positive"), (0.0, 0.5, 1.0)
METHODS = (*PARAMS, TRAINED, PROMPTED, PLAIN)


def make_config(folder: Path, **sections: object) -> Config:
    settings = {
        "run": "study",
        "storage": str(folder / "runs"),
        "objectives": {"brief": {"reward": "brevity"}, "positive": {"reward": "sentiment"}},
        "base": {"model": str(folder / "tiny-llama"), "dtype": "float32"},
        "prompts": {"train": 6, "validation": 3, "evaluation": 4},
        "rollout": {"max_tokens": 6, "cpus_per_actor": 1},
    }
    return config_module.parse({**settings, **sections})


def test_settings_that_generate_the_same_answers_are_equal() -> None:
    """A single preference has the whole weight; a prompt with both preferences and the base model have no weights."""
    alone = {setting(method, PAIR, 1.0) for method in (MATO, "without weight optimisation")}
    assert alone == {Setting(MATO, (("brief", 1.0),))}
    assert setting("without both", PAIR, 0.0) == setting("without online optimisation", PAIR, 0.0)
    assert setting(MATO, PAIR, 1.0) != setting("without both", PAIR, 1.0)
    for method in (PLAIN, PROMPTED):
        assert len({setting(method, PAIR, weight) for weight in WEIGHTS}) == 1
    for method in (TRAINED, *PARAMS):
        assert len({setting(method, PAIR, weight) for weight in WEIGHTS}) == 3


def test_every_setting_is_measured_once_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, "study", PAIR)
    config = make_config(tmp_path)
    store = Store(config.storage, config.run)
    first = answers.measure(config, store, WEIGHTS, 3, {MATO: 2})
    every = {setting(method, PAIR, weight) for method, weight in product(METHODS, WEIGHTS)}
    untrained = [method for method in METHODS if method != TRAINED]
    pairs = [(name, PERSONAL) for name in PAIR]
    every |= {setting(method, pair, weight) for pair, method, weight in product(pairs, untrained, WEIGHTS)}
    assert set(first.answers) == every
    assert all(len(found.text) == (6 if s.method == MATO else 3) for s, found in first.answers.items())
    texts = {s: tuple(answers.text) for s, answers in first.answers.items()}
    assert len(set(texts.values())) >= 6
    monkeypatch.setattr(answers, "load_engine", lambda *_: pytest.fail("nothing is left to measure"))
    assert answers.measure(config, store, WEIGHTS, 3, {MATO: 2}).answers == first.answers
    found = {**fronts.summarise(first).to_json(), **figures.provenance("command")}
    page = render(found)
    assert "### brief and positive" in page
    tables = [[line.count("|") for line in part.splitlines()] for part in page.split("\n\n") if part.startswith("|")]
    assert [len(set(widths)) for widths in tables] == [1] * 5
    figures.write(tmp_path / "figures.json", found)
    steerability.main(
        ["--page-only", "--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "page.md")]
    )
    assert page in (tmp_path / "page.md").read_text()


def test_a_run_without_two_objectives_with_preferences_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, objectives={"brief": {"reward": "brevity"}})
    with pytest.raises(UserError, match="fewer than two objectives"):
        answers.measure(config, Store(config.storage, config.run), WEIGHTS, 3, {})


def made_up(tmp_path: Path) -> Measured:
    """MATO's rewards equal the weights; each further method's are lower by a step, and one method's are reversed."""
    answers, num_prompts = {}, 20
    noise = np.random.default_rng(0).normal(size=num_prompts)
    for step, method in enumerate(METHODS):
        for weight in WEIGHTS:
            shares = dict(zip(PAIR, (weight, 1 - weight), strict=True))
            if method == "Linear Alignment":
                shares = dict(zip(PAIR, (1 - weight, weight), strict=True))
            reward = {name: (10 + 2 * (share - 0.1 * step + noise)).tolist() for name, share in shares.items()}
            answers[setting(method, PAIR, weight)] = Answers(
                [""] * num_prompts, [5] * num_prompts, [1.0] * num_prompts, reward
            )
    scales = dict.fromkeys(PAIR, RewardScale(10.0, 2.0))
    return Measured(make_config(tmp_path), scales, WEIGHTS, num_prompts, {}, answers)


def test_a_way_that_has_not_all_pairs_is_compared_on_those_it_has(tmp_path: Path) -> None:
    """MATO's gains on a pair without value models do not enter the difference."""
    one = made_up(tmp_path)
    extra = {
        setting(method, (name, PERSONAL), weight): Answers(
            [""] * 20, [5] * 20, [1.0] * 20, dict.fromkeys(PAIR, [99.0] * 20)
        )
        for method, name, weight in product(METHODS, PAIR, (0.0, 0.5))
        if method != TRAINED
    }
    scales = {**one.scales, PERSONAL: RewardScale(10.0, 2.0)}
    found = {**extra, **one.answers}
    answers = {s: replace(a, reward={**a.reward, PERSONAL: [99.0] * 20}) for s, a in found.items()}
    many = replace(one, scales=scales, answers=answers)
    alone, beside = ({s.method: s for s in fronts.summarise(m).summaries} for m in (one, many))
    assert (beside[MATO].num_pairs, beside[TRAINED].num_pairs) == (3, 1)
    assert beside[TRAINED].behind_mato == alone[TRAINED].behind_mato
    assert beside[MATO].weighted.mean > alone[MATO].weighted.mean + 1


def test_the_first_person_is_counted_by_words() -> None:
    answers = ["I'm sure we did.", "Mine, not yours", "island myth", ""]
    assert first_person([""] * 4, answers) == [2 / 5, 1 / 3, 0.0, 0.0]


def test_fronts_are_read_in_units_of_the_run(tmp_path: Path) -> None:
    measured = made_up(tmp_path)
    noise = np.random.default_rng(0).normal(size=20)
    by_method = {front.method: front for front in fronts.summarise(measured).fronts}
    # The corners of MATO are those of the last method with the same strength: one setting, one set of answers.
    np.testing.assert_allclose(by_method[MATO].rewards[1], [0.5 + noise.mean()] * 2)
    assert by_method[MATO].spearman == pytest.approx([1.0, 1.0])
    assert by_method["Linear Alignment"].spearman == pytest.approx([-1.0, -1.0])
    assert (by_method[PLAIN].spearman, len(by_method[PLAIN].rewards)) == ([], 1)
    assert by_method[MATO].hypervolume > by_method[TRAINED].hypervolume > by_method[PROMPTED].hypervolume >= 0


def test_ways_are_compared_by_prompt(tmp_path: Path) -> None:
    """The paired difference is exact although prompts differ by a standard deviation."""
    summaries = {summary.method: summary for summary in fronts.summarise(made_up(tmp_path)).summaries}
    assert summaries[MATO].behind_mato is None
    assert summaries[MATO].weighted.high - summaries[MATO].weighted.low > 0.5
    behind = summaries[TRAINED].behind_mato
    assert behind is not None
    assert behind.high - behind.low < 1e-9
    assert behind.mean > 0.3


def test_samples_of_a_prompt_count_as_one(tmp_path: Path) -> None:
    measured = made_up(tmp_path)
    halves = replace(measured, num_prompts=10, samples=dict.fromkeys(METHODS, 2))
    whole, half = (fronts.summarise(m).summaries[0].weighted for m in (measured, halves))
    assert half.mean == pytest.approx(whole.mean)
    json.dumps(fronts.summarise(halves).to_json())


# --- pages that several commands write ---------------------------------------------------------------------------


def test_a_part_replaces_only_itself(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    write_part(page, "a", "first\n")
    write_part(page, "b", "second")
    write_part(page, "a", "third")
    text = page.read_text()
    assert "first" not in text
    assert text.index("third") < text.index("second")
    write_part(page, "a", "third")
    assert page.read_text() == text


def test_a_part_without_its_end_marker_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- part: a -->\nrest of the page\n")
    with pytest.raises(ValueError, match="end of part: a"):
        write_part(page, "a", "new")
    assert "rest of the page" in page.read_text()
