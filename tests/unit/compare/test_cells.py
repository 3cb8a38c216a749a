"""Cells: which there are, what their files are named after, and that their answers come back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mavis_dist.compare.cells import Cell, Weights, plan_cells, read, weight_vectors, weights_name, write
from mavis_dist.compare.method import Answer, make_methods
from mavis_dist.compare.text_quality import Surprise
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import Prompt
from tests import tiny

PROMPTS = [Prompt("p0", "one?"), Prompt("p1", "two?")]


@pytest.mark.parametrize(
    ("objectives", "steps", "count"), [(1, 5, 1), (2, 5, 2 + 3), (2, 2, 2), (3, 5, 3 + 3 * 3 + 3), (4, 3, 4 + 6)]
)
def test_weights_are_the_corners_and_the_inner_points_of_pairs_and_triples(
    objectives: int, steps: int, count: int
) -> None:
    names = [f"o{i}" for i in range(objectives)]
    vectors = weight_vectors(names, steps)
    assert len(set(vectors)) == len(vectors) == count
    assert vectors[:objectives] == [((name, 1.0),) for name in names]
    for weights in vectors:
        assert math.fsum(weight for _, weight in weights) == pytest.approx(1.0)
        assert all(weight > 0 for _, weight in weights)


def test_a_pair_has_its_weights_in_order() -> None:
    found = [weights_name(weights) for weights in weight_vectors(["a", "b"], 5)]
    assert found == ["a", "b", "0.75 a + 0.25 b", "0.5 a + 0.5 b", "0.25 a + 0.75 b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    tiny.write_models(folder, "run", ("a", "b"))
    return folder


def plan(folder: Path, prompts: list[Prompt] = PROMPTS, fingerprint: str = "base", **changes: Any) -> list[Cell]:
    settings: dict[str, Any] = {
        "run": "run",
        "storage": str(folder / "runs"),
        "objectives": {"a": {"reward": "sentiment"}, "b": {"reward": "brevity"}},
        "base": {"model": str(folder / tiny.MODEL)},
        "compare": {"methods": {"mavis": {"strengths": [1, 2]}, "mato": {"strengths": [1]}}, "weights": 3, "seeds": 2},
    }
    settings["compare"] |= changes.pop("compare", {})
    config = Config(**{**settings, **changes})
    return plan_cells(config, make_methods(config.compare, Workspace(config)), prompts, fingerprint)


def test_cells_are_methods_by_weights_by_strengths_by_seeds(folder: Path) -> None:
    cells = plan(folder)
    assert len(cells) == len({cell.path for cell in cells}) == 2 * (1 + 3 * 2 + 3 * 1)
    assert [cell.method for cell in cells] == ["base"] * 2 + ["mavis"] * 12 + ["mato"] * 6
    assert cells[2].name == "mavis, a, strength 1, seed 0"


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, ["base", "mavis", "mato"]),
        ({"compare": {"kl": 1.0}}, ["base", "mavis", "mato"]),
        ({"rollout": {"rows": 3}}, ["base", "mavis", "mato"]),
        ({"base": {"model": "elsewhere"}}, ["base", "mavis", "mato"]),  # its fingerprint counts
        ({"fingerprint": "another"}, []),
        ({"prompts": PROMPTS[:1]}, []),
        ({"rollout": {"max_tokens": 9}}, []),
        ({"steer": {"tilt_cap": 1.0}}, ["base", "mato"]),
        ({"compare": {"preferences": {"a": "Be glad."}}}, ["base", "mavis"]),
        ({"objectives": {"a": {"reward": "sentiment"}, "b": {"reward": "sentiment"}}}, []),
    ],
)
def test_a_cell_is_computed_again_if_anything_changes_that_its_answers_depend_on(
    folder: Path, changes: dict[str, Any], same: list[str]
) -> None:
    changes = dict(changes)
    prompts, fingerprint = changes.pop("prompts", PROMPTS), changes.pop("fingerprint", "base")
    before = plan(folder)
    after = {cell.path for cell in plan(folder, prompts, fingerprint, **changes)}
    assert {cell.method for cell in before if cell.path in after} == set(same)


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    store, weights = Store(str(tmp_path), "run"), (("a", 1.0),)
    cell = Cell("mine", weights, 1.0, 0, "comparison/cells/mine.parquet")
    answers = [Answer("héllo\n", 3, 0.5, 7, 4, 0.25), Answer("", 1, None, 1)]
    rewards = {"a": [0.5, -2.0], "b": [1.0, 2.0]}
    write(store, cell.path, PROMPTS, answers, rewards, [Surprise(1.5, 2), Surprise(0.0, 0)], "a GPU")
    found = read(store, cell, PROMPTS)
    assert found.text == ["héllo\n", ""]
    assert found.divergence == pytest.approx([0.5, np.nan], nan_ok=True)
    assert (found.generated.tolist(), found.reward_calls.tolist()) == ([7, 1], [4, 0])
    assert {name: scores.tolist() for name, scores in found.reward.items()} == rewards
    assert found.surprise.tolist() == [1.5, 0.0]
    assert found.machine == "a GPU"
    with pytest.raises(StoreError, match=r"mine\.parquet is damaged"):
        read(store, cell, PROMPTS[::-1])
    (tmp_path / "run" / cell.path).write_bytes(b"no parquet")
    with pytest.raises(StoreError, match="delete it and run again"):
        read(store, cell, PROMPTS)


def test_stored_cells_that_do_not_name_their_machine_are_still_read(tmp_path: Path) -> None:
    store, cell = Store(str(tmp_path), "run"), Cell("mine", (), 0.0, 0, "comparison/cells/mine.parquet")
    write(store, cell.path, PROMPTS, [Answer("", 1, None, 1)] * 2, {}, [Surprise(0.0, 0)] * 2, "a GPU")
    file = tmp_path / "run" / cell.path
    pq.write_table(pq.read_table(file).drop_columns("machine"), file)
    assert read(store, cell, PROMPTS).machine == ""


def test_the_name_of_no_weights() -> None:
    empty: Weights = ()
    assert weights_name(empty) == "base"
