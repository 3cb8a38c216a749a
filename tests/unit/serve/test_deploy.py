"""What a replica refuses to start with ends the deployment at once, in one line."""

from __future__ import annotations

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
