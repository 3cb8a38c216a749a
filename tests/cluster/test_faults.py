"""Kills, stops, torn and lost files do not change the results of a run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

from benchmarks.machines.scenarios import ACTOR, has_process
from mavis_dist.store.files import MARKER, Store, StoreError
from tests.cluster.jobs import LIMIT_S, finish, hashes, run_here, start, write_config


@pytest.fixture(params=[2])
def machines(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Machines of one core each; all but the first one may be lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(request.param - 1):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    if ray.is_initialized():  # it has taken away the key-value store of this process, which is another cluster's
        internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


def wait(job: subprocess.Popen[str], condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert job.poll() is None, f"the job ended before {what}: {job.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"{what} took too long"
        time.sleep(0.02)


def workers(cluster: Cluster, title: str) -> list[psutil.Process]:
    """Processes of a cluster's actors."""
    found = []
    for node in cluster.list_all_nodes():
        for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [process] if title in " ".join(process.cmdline()) else []
    return found


@pytest.mark.long
@pytest.mark.faults
def test_kills_of_actors_workers_machines_and_drivers_give_the_same_bytes(
    undisturbed: Store, config_file: Path, machines: Cluster
) -> None:
    store = Store(undisturbed.storage, "disturbed")
    root = Path(store.root)
    arguments = ("run=disturbed", "rollout.actors=2")

    def checkpoints(iteration: int) -> int:
        """How many objectives have a complete one."""
        return len({path.parts[-5] for path in root.glob(f"train/*/i{iteration}/checkpoints/step-*/{MARKER}")})

    job = start(config_file, machines.address, *arguments)
    wait(job, lambda: workers(machines, "ray::Worker"), "the first actor")
    workers(machines, "ray::Worker")[0].kill()
    wait(job, lambda: checkpoints(0) == 2, "checkpoints of both objectives")
    machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
    wait(job, lambda: store.exists(f"labels/brief-i1/brief/{MARKER}"), "labels of the second iteration")
    job.kill()
    _, err = job.communicate()
    assert "an actor died" in err
    assert "a worker died; resuming from the newest checkpoint" in err

    job = start(config_file, machines.address, *arguments)
    wait(job, lambda: checkpoints(1), "a checkpoint of the second iteration")
    job.send_signal(signal.SIGTERM)
    _, err = finish(job, code=143)
    assert "stopped: finished work is saved" in err
    assert checkpoints(1) or list(root.glob(f"values/*/i1/{MARKER}"))  # those of a finished one are deleted

    job = start(config_file, machines.address, *arguments)
    wait(job, lambda: workers(machines, "ray::RayTrainWorker"), "a training worker")
    before = checkpoints(1)
    wait(job, lambda: checkpoints(1) != before or store.exists(f"values/brief/i1/{MARKER}"), "the next checkpoint")
    for worker in workers(machines, "ray::RayTrainWorker"):
        worker.kill()
    _, err = finish(job)
    assert hashes(store) == hashes(undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("machines", [4], indirect=True)
def test_groups_over_two_machines_give_the_same_bytes_when_one_of_them_is_lost(
    tmp_path: Path, machines: Cluster
) -> None:
    file = write_config(tmp_path)
    methods = {"mavis": {"strengths": [2]}, "best_of_n_value": {"strengths": [2]}, "mato": {"strengths": [1]}}
    compared = {"methods": methods, "weights": 2, "seeds": 1, "preferences": {"vowels": "Use many vowels."}}
    settings = yaml.safe_load(file.read_text())
    settings["base"]["tensor_parallel"] = 2
    settings["rollout"]["actors"] = 1
    settings["train"]["epochs"] = 2
    file.write_text(yaml.safe_dump({**settings, "iterations": 1, "compare": compared}))
    finish(start(file, machines.address, "run=whole"))

    def of_the_group() -> list[Any]:
        return [node for node in machines.worker_nodes if has_process(node, ("ray::Follower", ACTOR))]

    job, shards = start(file, machines.address, "run=struck"), tmp_path / "runs/struck/rollouts/base"
    wait(job, lambda: list(shards.glob("*.parquet")) and of_the_group(), "trees of a group")
    machines.remove_node(of_the_group()[0], allow_graceful=False)
    _, err = finish(job)
    assert "an actor died" in err
    whole, struck = (Store(str(tmp_path / "runs"), run) for run in ("whole", "struck"))
    assert hashes(struck) == hashes(whole)
    out, _ = finish(start(file, machines.address, "run=struck", job="evaluate"))
    assert all(method in out for method in methods)


UNMARKED = {"run.yaml", "stages.json", "report.html", "values/vowels/published.json", "values/brief/published.json"}


def files(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_folder_with_any_damaged_file_is_not_finished(undisturbed: Store, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "run"
    shutil.copytree(undisturbed.root, root)
    store, unmarked = Store(str(tmp_path), "run"), set()
    for name in files(root):
        path = root / name
        if not (path.parent / MARKER).exists():
            unmarked.add(name)
            continue
        content = path.read_bytes()
        folder = str(Path(name).parent)
        assert store.metadata(folder) is not None
        path.write_bytes(content[:-1]) if damage == "truncate" else path.unlink()
        assert store.metadata(folder) is None, name
        path.write_bytes(content)
    events = {name for name in unmarked if "/tensorboard/" in name}
    assert unmarked - events == UNMARKED


@pytest.mark.long
@pytest.mark.faults
def test_damage_in_every_stage_is_repaired_to_the_same_bytes_and_an_objective_added_without_base_rollouts(
    undisturbed: Store, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "undisturbed"
    shutil.copytree(undisturbed.root, root)
    torn = [
        f"rollouts/brief-i1/{MARKER}",
        "values/vowels/i0/model.safetensors",
        f"gate/vowels/i1/{MARKER}",
        "eval/sweep/sweep.json",
        "eval/limit/answers/by_prompt.json",
        f"eval/limit/rewards/brief/{MARKER}",
        "values/brief/published.json",
        "stages.json",
    ]
    lost = [
        "rollouts/vowels-i1/part-00000.parquet",
        "labels/brief-i1/brief/part-00000.parquet",
        "values/brief/i1/metrics.jsonl",
        "report.html",
        "values/vowels/published.json",
    ]
    for name in torn:
        (root / name).write_bytes((root / name).read_bytes()[:-7])
    for name in lost:
        (root / name).unlink()
    base_trees = {path: path.stat().st_mtime_ns for path in root.glob("rollouts/base/*")}
    more = ["objectives.again.reward=function", "objectives.again.path=tests.tiny:count_vowels"]
    _, err = run_here(capsys, config_file, f"storage={tmp_path}", *more)
    assert "rollouts/base finished before, skipped" in err
    assert base_trees == {path: path.stat().st_mtime_ns for path in root.glob("rollouts/base/*")}
    before, after = hashes(undisturbed), hashes(Store(str(tmp_path), "undisturbed"))
    assert {path for path in before if after[path] != before[path]} == {"eval/sweep/sweep.json"}
    assert {"values/again/i0/model.safetensors", "values/again/i1/model.safetensors"} <= after.keys()
    assert {name for name in UNMARKED if not (root / name).exists()} == set()


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_config_of_a_run_is_named(undisturbed: Store, config_file: Path, tmp_path: Path, damage: str) -> None:
    from mavis_dist.config import load
    from mavis_dist.run_state import check_same_run

    root = tmp_path / "undisturbed"
    (root / "rollouts").mkdir(parents=True)
    if damage == "truncate":
        (root / "run.yaml").write_bytes(undisturbed.read_bytes("run.yaml")[:200])
    with pytest.raises(StoreError, match=r"run\.yaml"):
        check_same_run(Store(str(tmp_path), "undisturbed"), load(config_file))
