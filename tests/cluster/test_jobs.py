"""Jobs that are submitted to a cluster: stopped, resumed, refused."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.runtime_env import packaging
from ray._private.utils import write_ray_address

from jobs import submit
from mavis_dist import cluster
from mavis_dist.config import load
from mavis_dist.failures import failure_of
from mavis_dist.store.files import MARKER, Store
from mavis_dist.types import UserError
from tests.cluster.jobs import LIMIT_S
from tests.root import ROOT
from tests.tiny import write_base


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


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own, with the config of a short run."""
    root = tmp_path / "checkout"
    for folder in ("jobs", "mavis_dist", "serve"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {
        "run": "short",
        "storage": str(tmp_path / "runs"),
        "objectives": {"brief": {"reward": "brevity"}},
        "base": {"model": str(write_base(tmp_path, eos_weight=1.0)), "dtype": "float32"},
        "prompts": {"train": 4, "validation": 1, "evaluation": 2},
        "rollout": {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 8, "cpus_per_actor": 1},
        "evaluate": {"limit_answers": 4},
        "value": {"layers": 1},
        "train": {"epochs": 40, "trees_per_step": 1},
    }
    (root / "my.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(submit, "ROOT", root)
    monkeypatch.chdir(root)
    return root


def run_job(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        submit.main([*arguments, "--python", sys.executable, "pipeline", "--config", "my.yaml"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.long
def test_a_job_is_stopped_resumed_and_not_repeated(
    ray_address: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = ray.init(ignore_reinit_error=True)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{context.dashboard_url}")
    write_ray_address(ray_address)  # other tests have started and ended clusters since
    store = Store(str(checkout.parent / "runs"), "short")
    assert run_job("--no-wait") == 0
    client, name = submit.connect(f"http://{context.dashboard_url}"), "pipeline-short"
    deadline = time.monotonic() + LIMIT_S
    while not list(Path(store.root).glob(f"train/brief/i0/checkpoints/step-*/{MARKER}")):
        found = submit.known(client, name)
        assert found is not None
        assert found.status in submit.ACTIVE, client.get_job_logs(name)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run_job("--stop") == 0
    assert run_job() == submit.FAILED  # follows it to its end
    told = capsys.readouterr()
    assert "stopped: finished work is saved, the same command resumes from there" in told.out
    assert store.metadata("rollouts/base") is not None
    assert store.metadata("values/brief/i0") is None

    assert run_job() == 0
    told = capsys.readouterr()
    assert "pipeline-short           resumes" in told.err
    assert "rollouts/base finished before, skipped" in told.out
    assert store.metadata("values/brief/i0") is not None

    assert run_job() == 0
    assert "finished before; --again runs it again" in capsys.readouterr().err


def test_what_cannot_be_submitted_is_refused_in_one_line(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = ray.init(ignore_reinit_error=True)
    address = f"http://{context.dashboard_url}"
    outside = tmp_path / "outside.yaml"
    shutil.copy("my.yaml", outside)
    for config, dashboard, problem in (
        (str(outside), address, "is outside of"),
        ("my.yaml", "http://127.0.0.1:9", "--dashboard http://127.0.0.1:9 cannot be used"),
        ("none.yaml", address, "config file 'none.yaml' does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            submit.main(["--dashboard", dashboard, "pipeline", "--config", config])
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert problem in line
