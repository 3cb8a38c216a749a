"""The times of a run's stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from mavis_dist.evaluate import collect
from mavis_dist.evaluate.collect import stage_seconds, stages_of, timed
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.types import Stopped


def test_all_parts_and_attempts_of_a_stage_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 14.0, 20.0, 25.0, 30.0])
    monkeypatch.setattr(collect.time, "monotonic", lambda: next(clock))
    store = Store(str(tmp_path), "run")
    with pytest.raises(Stopped), timed(store, "train i0", "2 value models"):
        raise Stopped
    with timed(store, "labels i0", "2 sets of leaves"):
        pass
    with timed(store, "train i0", "1 value models"):
        pass
    with timed(store, "train i0", "nothing", is_needed=False):
        pass
    assert stage_seconds(store) == {"labels i0": 4.0, "train i0": 8.0}
    assert stage_seconds(store, ("train ",)) == {"train i0": 8.0}
    assert stages_of(store)[-1].detail == "1 value models"
    store.write_bytes(layout.STAGES_FILE, b"[torn")
    assert stage_seconds(store) == {}
