"""What a replica refuses to start with ends the deployment at once, in one line."""

from __future__ import annotations

import socket
import traceback
from types import SimpleNamespace

import pytest

from mavis_dist.models.directory import ModelError
from serve import app


def said(error: Exception) -> str:
    """Serve's message about a replica whose constructor raised an error."""
    try:
        raise error
    except Exception:
        text = traceback.format_exc()
    return f"The deployment failed to start 1 times in a row. Error:\n\x1b[36mray::Base.__init__()\x1b[39m\n{text}\n"


def ready(monkeypatch: pytest.MonkeyPatch, state: str, *messages: str) -> str | None:
    deployments = {str(n): SimpleNamespace(message=message) for n, message in enumerate(messages)}
    status = SimpleNamespace(status=state, message="", deployments=deployments)
    monkeypatch.setattr(app.serve, "status", lambda: SimpleNamespace(applications={"main": status}))
    return app._applications_ready(["main"])


@pytest.mark.parametrize("state", ["DEPLOYING", "DEPLOY_FAILED", "UNHEALTHY"])
def test_a_user_error_of_a_replica_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    message = said(ModelError("model 'x' does not exist: give one"))
    with pytest.raises(app.DeployError) as failed:
        ready(monkeypatch, state, message, "waiting for the base replicas")
    assert str(failed.value) == "application 'main' failed to start: model 'x' does not exist: give one"


def test_other_exceptions_are_tried_again_and_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = said(OSError("the network\nis gone"))
    assert "the network" in str(ready(monkeypatch, "DEPLOYING", message))
    with pytest.raises(app.DeployError, match=r"^application 'main' failed to start: OSError: the network.*\(.*\)$"):
        ready(monkeypatch, "DEPLOY_FAILED", message)
    assert ready(monkeypatch, "RUNNING") is None


bind_problem = app._bind_problem._function


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[socket.AddressFamily, tuple]) -> None:
    found = [(family, socket.SOCK_STREAM, 0, "", address) for family, address in addresses]
    monkeypatch.setattr(app.socket, "getaddrinfo", lambda *_, **__: found)


def test_every_address_of_a_name_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.2", 0)) as other:
        place, free = taken.getsockname(), ("127.0.0.2", taken.getsockname()[1])
        resolving(monkeypatch, (socket.AF_INET, free), (socket.AF_INET, place))
        assert "in use" in bind_problem("name", place[1])
        resolving(monkeypatch, (socket.AF_INET, free))
        assert bind_problem("name", place[1]) == ""
        resolving(monkeypatch, (socket.AF_INET, other.getsockname()))
        assert "in use" in bind_problem("name", place[1])


def test_an_address_that_the_machine_does_not_have_matters_if_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nowhere, here = (socket.AF_INET, ("192.0.2.1", 0)), (socket.AF_INET, ("127.0.0.1", 0))
    resolving(monkeypatch, nowhere, here)
    assert bind_problem("name", 0) == ""
    resolving(monkeypatch, nowhere)
    assert "Cannot assign" in bind_problem("name", 0)


def test_the_scope_of_an_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link-local address is one of an interface, whose number only the resolved address has."""
    bound: list[tuple] = []
    monkeypatch.setattr(socket.socket, "bind", lambda _, address: bound.append(address))
    resolving(monkeypatch, (socket.AF_INET, ("127.0.0.1", 1, 0, 2)))
    assert bind_problem("fe80::1%eth0", 1) == ""
    assert bound == [("127.0.0.1", 1, 0, 2)]
