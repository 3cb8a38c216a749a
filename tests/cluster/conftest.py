"""One finished run of the pipeline, shared by all tests that compare with it or damage a copy of it.

With a tiny random model, or with the one that MAVIS_FAULTS_MODEL names; the same tests then take minutes each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from mavis_dist.store.files import Store
from tests.cluster.jobs import finish, start, write_config


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    return write_config(folder, os.environ.get("MAVIS_FAULTS_MODEL"))


@pytest.fixture(scope="session")
def undisturbed(config_file: Path, ray_address: str) -> Store:
    settings = yaml.safe_load(config_file.read_text())
    out, err = finish(start(config_file, ray_address))
    assert "hypervolume" in out
    stages = ("rollouts i", "labels i", "train i", "gate i")
    for stage in [f"{stage}{iteration}" for stage in stages for iteration in (0, 1)] + ["limit", "evaluate"]:
        assert stage in err, stage
    return Store(settings["storage"], "undisturbed")
