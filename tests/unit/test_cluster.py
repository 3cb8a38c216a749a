"""What the driver forwards to the cluster, and where its service can listen."""

from __future__ import annotations

import json
import socket

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.runtime_env.runtime_env import _merge_runtime_env

from mavis_dist import cluster
from mavis_dist.cluster import forwarded_variables


def test_a_job_may_be_submitted_with_variables_that_are_forwarded_without_it(monkeypatch):
    monkeypatch.setenv("MAVIS_CACHE", "/shared/cache")
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    assert forwarded_variables().items() >= {"MAVIS_CACHE": "/shared/cache", "HF_HOME": "/shared/hub"}.items()
    submitted = {"env_vars": {"MAVIS_CACHE": "/shared/cache", "OTHER": "1"}}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": submitted}))
    merged = _merge_runtime_env(submitted, {"env_vars": forwarded_variables()})
    assert merged is not None, "Ray takes both"
    assert merged["env_vars"].items() >= {"MAVIS_CACHE": "/shared/cache", "HF_HOME": "/shared/hub"}.items()


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[socket.AddressFamily, tuple]) -> None:
    found = [(family, socket.SOCK_STREAM, 0, "", address) for family, address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_every_address_of_a_name_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.2", 0)) as other:
        place, free = taken.getsockname(), ("127.0.0.2", taken.getsockname()[1])
        resolving(monkeypatch, (socket.AF_INET, free), (socket.AF_INET, place))
        assert "in use" in cluster.bind_problem("name", place[1])
        resolving(monkeypatch, (socket.AF_INET, free))
        assert cluster.bind_problem("name", place[1]) == ""
        resolving(monkeypatch, (socket.AF_INET, other.getsockname()))
        assert "in use" in cluster.bind_problem("name", place[1])


def test_an_address_that_the_machine_does_not_have_matters_if_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nowhere, here = (socket.AF_INET, ("192.0.2.1", 0)), (socket.AF_INET, ("127.0.0.1", 0))
    resolving(monkeypatch, nowhere, here)
    assert cluster.bind_problem("name", 0) == ""
    resolving(monkeypatch, nowhere)
    assert "Cannot assign" in cluster.bind_problem("name", 0)


def test_the_scope_of_an_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link-local address is one of an interface, whose number only the resolved address has."""
    bound: list[tuple] = []
    monkeypatch.setattr(socket.socket, "bind", lambda _, address: bound.append(address))
    resolving(monkeypatch, (socket.AF_INET, ("127.0.0.1", 1, 0, 2)))
    assert cluster.bind_problem("fe80::1%eth0", 1) == ""
    assert bound == [("127.0.0.1", 1, 0, 2)]
