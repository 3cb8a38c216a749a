"""Adding and removing replicas does not disturb running streams."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from jobs import scale as job
from mavis_dist.config import Config
from serve.dashboard import Dashboard, ScaleError
from serve.settings import main_args, value_args
from tests.serving.test_live_changes import streamed
from tests.streams import LONG, replica_pids, whole_text

pytestmark = pytest.mark.long

LIMIT_S = 180
PAUSE_S = 0.2  # of a client between two answers: replicas that start need the cores, too
BY_LOAD, BY_FILE = "by-load", "by-file"


@pytest.fixture(scope="module")
def bodies(served_config: Config) -> list[dict]:
    return [{**LONG, "model": served_config.base.model, "seed": seed} for seed in range(6)]


@pytest.fixture(scope="module")
def dashboard(ray_address: str) -> Iterator[httpx.Client]:
    context = ray.init(ignore_reinit_error=True)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://{context.dashboard_url}", headers=headers, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def declare(url: str, served_config: Config, dashboard: httpx.Client) -> Iterator[Callable[[int], None]]:
    """Deploys, as a file would, an application that load scales and one with a fixed count of value replicas."""
    settings = {"rows": 4, "replicas": {"min": 1, "max": 2}, "upscale_delay_s": 0, "downscale_delay_s": 0}
    main = {**main_args(served_config).model_dump(mode="json"), "placement": "colocated", **settings}
    value = value_args(served_config, "brief").model_dump(mode="json")

    def put(*applications: dict) -> None:
        dashboard.put("/api/serve/applications/", json={"applications": applications}).raise_for_status()

    def declare(replicas: int) -> None:
        put(
            {"name": BY_LOAD, "import_path": "serve.app:build_main", "args": main, "route_prefix": f"/{BY_LOAD}"},
            {
                "name": BY_FILE,
                "import_path": "serve.app:build_value",
                "args": value,
                "route_prefix": None,
                "deployments": [{"name": "Value", "num_replicas": replicas}],
            },
        )
        wait_for_replicas(BY_FILE, "Value", replicas)

    declare(1)
    wait_for_replicas(BY_LOAD, "Base", 1)
    wait_for_replicas(BY_LOAD, "Gateway", 1)
    yield declare
    put()


def scale(dashboard: httpx.Client, application: str, deployment: str, replicas: int) -> None:
    path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
    dashboard.post(path, json={"target_num_replicas": replicas}).raise_for_status()


def wait_for_replicas(application: str, deployment: str, replicas: int) -> None:
    """Until so many run, and none is starting or stopping."""
    deadline = time.monotonic() + LIMIT_S
    while (states := replica_states(application, deployment)) != {"RUNNING": replicas}:
        assert time.monotonic() < deadline, states
        time.sleep(0.2)


def replica_states(application: str, deployment: str) -> dict[str, int]:
    status = serve.status().applications.get(application)
    return dict(status.deployments[deployment].replica_states) if status and deployment in status.deployments else {}


@contextmanager
def streaming(http: httpx.Client, url: str, bodies: list[dict]) -> Iterator[None]:
    """One client for each body, which sends it repeatedly and checks that it always gets the same text."""
    expected = [whole_text(http, url, body) for body in bodies]
    stop = threading.Event()

    def ask_on(body: dict) -> set[str]:
        texts = set()
        while not stop.is_set():
            texts.add(streamed(http, url, body))
            stop.wait(PAUSE_S)
        return texts

    with ThreadPoolExecutor(len(bodies)) as pool:
        asking = [pool.submit(ask_on, body) for body in bodies]
        try:
            yield
        finally:
            stop.set()
        assert [future.result(60) for future in asking] == [{text} for text in expected]


def test_high_load_adds_a_base_replica_and_low_load_removes_it(http, url, declare, bodies):
    with streaming(http, f"{url}/{BY_LOAD}", bodies[:1]):
        with streaming(http, f"{url}/{BY_LOAD}", bodies[1:]):
            wait_for_replicas(BY_LOAD, "Base", 2)
        wait_for_replicas(BY_LOAD, "Base", 1)


def test_another_count_in_the_file_does_not_restart_running_replicas(declare):
    begun = [replica_pids(BY_FILE, "Value")]
    for replicas in (2, 1):
        declare(replicas)
        begun.append(replica_pids(BY_FILE, "Value"))
    assert [len(pids) for pids in begun] == [1, 2, 1]
    assert set(begun[0]) | set(begun[2]) <= set(begun[1])


def test_the_job_scales_a_fixed_count(http, url, dashboard, bodies, capsys):
    address = str(dashboard.base_url)
    with streaming(http, url, bodies[:3]):
        job.main(["base=1", "positive=2", "--dashboard", address, "--wait", str(LIMIT_S)])
        table = capsys.readouterr().out
        assert rows_of(table)["base"] == ["1", "1", "healthy"]
        assert rows_of(table)["positive"] == ["2", "2", "healthy"]
        job.main(["base=2", "positive=1", "--dashboard", address, "--wait", str(LIMIT_S)])
    capsys.readouterr()
    job.main(["--dashboard", address])
    table = capsys.readouterr().out
    assert rows_of(table) == {
        "base": ["2", "2", "healthy"],
        "brief": ["1", "1", "healthy"],
        "positive": ["1", "1", "healthy"],
    }


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line.split() for line in table.splitlines()[2:]]
    return {name: counts for name, *counts in lines}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["baze=2"], "'baze' has no replicas of its own: there are base, brief"),
        (["base=0"], "'base=0' is not NAME=COUNT with a count of at least 1"),
        (["base=2", "--dashboard", "http://127.0.0.1:9"], "--dashboard http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_cannot_be_scaled_is_refused_in_one_line(url, dashboard, arguments, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        job.main(["--dashboard", str(dashboard.base_url), *arguments])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_another_token_is_refused(url, dashboard, monkeypatch):
    other = Dashboard(str(dashboard.base_url))
    other._http.headers["Authorization"] = "Bearer 0123456789abcdef0123456789abcdef"
    with pytest.raises(ScaleError, match=r"refuses the token \(40[13]\)"):
        other.replicas()


def test_the_rest_call_is_refused_with_autoscaling(declare, dashboard):
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        scale(dashboard, BY_LOAD, "Base", 2)
