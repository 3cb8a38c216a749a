"""A deployment that fails says why in one line and leaves nothing behind, so that the next one works."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from mavis_dist import config
from mavis_dist.plan import PlanError
from tests.tiny import MODEL, write_base, write_models


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    write_models(folder, "run", ("brief",))
    return folder


def settings(folder: Path, host: str, port: int, **serve: object) -> config.Config:
    return config.parse(
        {
            "run": "run",
            "storage": str(folder / "runs"),
            "objectives": {"brief": {"reward": "brevity"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
            "serve": {"host": host, "port": port, "placement": "colocated", "cpus_per_replica": 0.1, **serve},
        }
    )


@contextmanager
def taken_port(host: str, shares: bool = False) -> Iterator[int]:
    """The port of another program, which lets others listen beside it if it `shares`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        yield other.getsockname()[1]


def is_serve_running() -> bool:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def test_published_objectives_that_the_config_does_not_name_need_room_too(ray_address, tmp_path):
    from serve.app import deploy

    write_models(tmp_path, "run", ("brief", "positive"))
    with pytest.raises(PlanError, match=r"needs 2\.4 CPU .* for 3 processes with models and a gateway"):
        deploy(settings(tmp_path, "127.0.0.1", 1, placement="replicas", cpus_per_replica=0.6))
    assert not is_serve_running()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_a_port_that_is_taken(ray_address, folder, host, shares):
    from serve.app import DeployError, deploy

    with taken_port(host, shares) as port, pytest.raises(DeployError) as refused:
        deploy(settings(folder, host, port))
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert str(refused.value).startswith(f"nothing can listen on {where} (Address already in use): stop the program")
    assert "\n" not in str(refused.value)
    assert not is_serve_running()


def test_an_address_of_another_machine(ray_address, folder):
    from serve.app import DeployError, deploy

    with pytest.raises(DeployError, match=r"198\.51\.100\.7:8000 \(Cannot assign requested address\)"):
        deploy(settings(folder, "198.51.100.7", 8000, keys="none"))
    assert not is_serve_running()


@pytest.mark.parametrize("host", [pytest.param(HOSTS[0], marks=pytest.mark.long), HOSTS[1]])
def test_a_service_moves_to_another_address_when_it_has_ended(ray_address, folder, host, capsys):
    from serve.app import DeployError, deploy, undeploy

    with taken_port(host) as port:
        pass
    url = deploy(settings(folder, host, port, served_model_name="mine"))
    assert httpx.get(f"{url}/health", trust_env=False).json()["model"] == "mine"
    assert httpx.head(f"{url}/health/", trust_env=False).status_code == 200
    with taken_port(host) as another:
        pass
    with pytest.raises(DeployError, match=f"cannot change that while it runs: set serve.host={host} serve.port={port}"):
        deploy(settings(folder, host, another))
    body = {"model": "mine", "prompt": ["Once", "upon"], "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/completions/", json=body, trust_env=False)
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
    undeploy()
    assert not is_serve_running()
    time.sleep(1)  # for the lines that Ray collects
    printed = capsys.readouterr()
    assert "failed" not in printed.out + printed.err


def test_applications_that_fail_are_removed(ray_address, folder, tmp_path):
    from serve.app import DeployError, deploy

    with taken_port("127.0.0.1") as port:
        pass
    file = write_base(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]  # which only a replica notices, as it loads the weights
    save_file(weights, file, {"format": "pt"})
    damaged = settings(folder, "127.0.0.1", port)
    damaged = damaged.model_copy(update={"base": damaged.base.model_copy(update={"model": str(file.parent)})})
    with pytest.raises(DeployError, match="main"):
        deploy(damaged, limit_s=25)
    assert not is_serve_running()
