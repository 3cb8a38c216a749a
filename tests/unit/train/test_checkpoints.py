"""Which checkpoints are kept and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mavis_dist.sections import Train
from mavis_dist.store.files import Store
from mavis_dist.train.checkpoints import ENGINE, KEPT, Checkpoints, State
from mavis_dist.train.worker_group import WorkerGroup


class Engine:
    """Saves a file, and remembers which it was asked to load."""

    loaded: Path | None = None

    def save_checkpoint(self, folder: str, **options: Any) -> None:
        (Path(folder) / ENGINE).mkdir()
        (Path(folder) / ENGINE / "weights").write_bytes(b"weights")

    def load_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
        self.loaded = Path(folder) / tag


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), "run")


def checkpoints(store: Store, **settings: Any) -> Checkpoints:
    return Checkpoints(store, "checkpoints", WorkerGroup(), Train(**settings))


def save(found: Checkpoints, *steps: int) -> None:
    for step in steps:
        found.save(Engine(), State(step=step))


def test_a_training_with_other_sharding_keeps_its_own_checkpoints(store: Store) -> None:
    save(checkpoints(store), 150, 200)
    other = checkpoints(store, zero_stage=1)
    assert other.load(Engine()).step == 0
    save(other, 40)
    assert checkpoints(store, zero_stage=1).load(Engine()).step == 40
    save(other, 80, 120)
    assert store.list("checkpoints") == ["step-00000080", "step-00000120"]


def test_a_damaged_checkpoint_does_not_count_among_the_kept(store: Store) -> None:
    found = checkpoints(store)
    save(found, 10, 20, 30)
    (Path(store.root) / "checkpoints/step-00000030/weights").write_bytes(b"torn")
    assert found.load(Engine()).step == 20
    save(found, 25)
    assert len(store.list("checkpoints")) == KEPT
    assert found.load(Engine()).step == 25
