"""A comparison that is saved and loaded has the same figures, and parts of it fit together again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mavis_dist.compare.archive import KEY, Collected, load, save
from mavis_dist.compare.figures import summarise
from mavis_dist.compare.measured import Measured
from mavis_dist.compare.results import Comparison, TrainingCost
from mavis_dist.types import Prompt, RewardScale, UserError
from tests.unit.compare.made_up import NUM_PROMPTS, made_up

PROMPTS = [Prompt(str(n), f"question {n}") for n in range(NUM_PROMPTS)]


def collected(*methods: str) -> Collected:
    """The made-up comparison of some methods, by default of all."""
    whole = made_up()
    cells = {cell: found for cell, found in whole.cells.items() if not methods or cell.method in methods}
    measured = Measured(cells, whole.base_PN, whole.scales, whole.kl)
    training = dict.fromkeys(measured.methods, TrainingCost(60.5, 20.25, 9000, 3000, ["a GPU"]))
    return Collected(measured, PROMPTS, training, {"base model": "a tiny one"})


def figures(found: Collected) -> Comparison:
    return summarise(found.measured, found.training, found.conditions)


def test_a_saved_comparison_has_the_same_figures(tmp_path: Path) -> None:
    before, file = collected(), tmp_path / "new folder" / "answers.parquet"
    save(before, file)
    after = load([file])
    assert figures(after).to_json() == figures(before).to_json()
    assert after.prompts == PROMPTS
    assert list(after.measured.cells) == list(before.measured.cells)
    assert [found.text for found in after.measured.cells.values()] == [
        found.text for found in before.measured.cells.values()
    ]


def test_cells_may_name_rewards_in_any_order(tmp_path: Path) -> None:
    whole = collected()
    cells = dict(whole.measured.cells)
    first = next(iter(cells))
    cells[first] = replace(cells[first], reward=dict(reversed(cells[first].reward.items())))
    save(replace(whole, measured=replace(whole.measured, cells=cells)), tmp_path / "answers.parquet")
    assert figures(load([tmp_path / "answers.parquet"])).to_json() == figures(whole).to_json()


def test_methods_of_several_files_stand_side_by_side(tmp_path: Path) -> None:
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    save(collected("base", "mavis", "weak"), one)
    save(collected("base", "mavis", "short", "unknown"), other)
    assert figures(load([one, other])).to_json() == figures(collected()).to_json()


def test_of_a_cell_in_several_files_the_first_one_counts(tmp_path: Path) -> None:
    one, other, whole = tmp_path / "one.parquet", tmp_path / "other.parquet", collected()
    save(whole, one)
    elsewhere = {cell: replace(found, machine="a GPU") for cell, found in whole.measured.cells.items()}
    cheaper = dict.fromkeys(whole.training, TrainingCost(1.0, 1.0, 1, 1, []))
    save(replace(whole, measured=replace(whole.measured, cells=elsewhere), training=cheaper), other)
    assert figures(load([one, other])).to_json() == figures(whole).to_json()
    assert {found.machine for found in load([other, one]).measured.cells.values()} == {"a GPU"}


def test_files_of_different_comparisons_are_refused(tmp_path: Path) -> None:
    one, other, whole = tmp_path / "one.parquet", tmp_path / "other.parquet", collected()
    save(whole, one)
    measured = whole.measured
    shifted = {name: rewards + 1 for name, rewards in measured.base_PN.items()}
    retrained = {
        replace(cell, path="other") if cell.method == "weak" else cell: found for cell, found in measured.cells.items()
    }
    for changed, word in (
        (replace(whole, prompts=[Prompt("0", "changed"), *PROMPTS[1:]]), "prompts"),
        (replace(whole, measured=replace(measured, scales={**measured.scales, "a": RewardScale(0, 1)})), "scales"),
        (replace(whole, measured=replace(measured, base_PN=shifted)), "answers of the base model"),
        (replace(whole, measured=replace(measured, kl=1.0)), "compare.kl"),
        (replace(whole, measured=replace(measured, cells=retrained)), "answers of weak"),  # no further seeds
    ):
        save(changed, other)
        with pytest.raises(UserError, match=rf"one\.parquet and \S+other\.parquet are about other .*{word}"):
            load([one, other])


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    text, table = tmp_path / "text.parquet", tmp_path / "table.parquet"
    text.write_text("no table")
    pq.write_table(pa.table({"a": [1]}), table)
    damaged = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({KEY: "{}"}), damaged)
    for file in (text, table, damaged, tmp_path / "missing.parquet"):
        with pytest.raises(UserError, match=file.name):
            load([file])
