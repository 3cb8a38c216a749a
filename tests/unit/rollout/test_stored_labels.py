"""Labels of an earlier attempt are used again where they are those of the trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.core.tree import Tree
from mavis_dist.models.load import load_base
from mavis_dist.rollout import labels
from mavis_dist.rollout.labels import label_shards
from mavis_dist.store.files import Store
from mavis_dist.store.shards import read_labels, write_labels
from mavis_dist.types import Prompt
from tests.tiny import count_vowels, write_base
from tests.training.stored import store_trees

SHARDS = [("rollouts/base/part-00000.parquet", "scores/0"), ("rollouts/base/part-00000.parquet", "scores/1")]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_base(tmp_path, eos_weight=1.0)
    return config_module.parse(
        {
            "run": "run",
            "storage": str(tmp_path / "runs"),
            "objectives": {"vowels": {"reward": "function", "path": "tests.tiny:count_vowels"}},
            "base": {"model": str(tmp_path / "tiny-llama"), "dtype": "float32"},
            "rollout": {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 8},
        }
    )


@pytest.fixture
def trees(config: Config) -> list[Tree]:
    return store_trees(Store(config.storage, config.run), load_base(config.base.model), 3)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers were scored in every call of the reward."""
    counts = list[int]()

    class Reward:
        def score(self, prompts: list[str], answers: list[str]) -> list[float]:
            counts.append(len(answers))
            return count_vowels(prompts, answers)

    monkeypatch.setattr(labels, "build", lambda objective: Reward())
    return counts


def test_only_what_is_missing_or_damaged_is_scored(config: Config, trees: list[Tree], scored: list[int]) -> None:
    store, prompts = Store(config.storage, config.run), [Prompt(tree.prompt_id, "How?") for tree in trees]
    num_leaves = label_shards(config, "vowels", prompts, SHARDS)
    assert scored == [num_leaves / 2] * 2
    first = [Path(store.root, target).read_bytes() for _, target in SHARDS]
    assert label_shards(config, "vowels", prompts, SHARDS) == num_leaves
    assert len(scored) == 2

    Path(store.root, "scores/0").write_bytes(first[0][:-1])
    write_labels(store, "scores/1", read_labels(store, "scores/1")[:-1])  # of other trees
    assert label_shards(config, "vowels", prompts, SHARDS) == num_leaves
    assert len(scored) == 4
    assert [Path(store.root, target).read_bytes() for _, target in SHARDS] == first


def test_labels_without_unfinished_answers_are_not_those_with_them(
    config: Config, trees: list[Tree], scored: list[int]
) -> None:
    prompts = [Prompt(tree.prompt_id, "How?") for tree in trees]
    label_shards(config, "vowels", prompts, SHARDS[:1])
    with_prefixes = config.model_copy(update={"train": config.train.model_copy(update={"targets": "prefix"})})
    label_shards(with_prefixes, "vowels", prompts, SHARDS[:1])
    assert scored[1] > scored[0]
