"""Configs in Ray's copy of the folder that a job was submitted with."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from ray._private.runtime_env import packaging

from mavis_dist import cluster
from mavis_dist.config import load
from mavis_dist.failures import failure_of
from mavis_dist.types import UserError


def read(*overrides: str) -> tuple[str, str]:
    config = load("config.yaml", overrides)
    return config.storage, config.base.model


@pytest.mark.usefixtures("ray_address")
def test_results_in_the_copy_of_a_working_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    settings = {"run": "r", "objectives": {"brief": {"reward": "brevity"}}, "base": {"model": "./my-model"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    cluster.connect()
    package = packaging.get_uri_for_directory(str(tmp_path), include_gitignore=False)  # as `ray job submit` makes it
    packaging.upload_package_if_needed(package, str(tmp_path.parent), str(tmp_path), include_gitignore=False)
    task = ray.remote(read).options(runtime_env={"working_dir": package}, num_cpus=0)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(task.remote())
    refused = failure_of("check", raised.value)
    assert isinstance(refused, UserError)
    assert str(refused).startswith("config key 'storage' is 'runs': a job runs in Ray's copy of its working directory")
    assert ray.get(task.remote("storage=/shared/runs")) == ("/shared/runs", "./my-model")
