"""How a service ends that a terminal or a process manager started."""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from jobs import serve as job
from mavis_dist import cluster, config
from serve import app

CONFIG = config.parse({"run": "r", "objectives": {"brief": {"reward": "brevity"}}})


@pytest.fixture
def undeployed(monkeypatch) -> list[str]:
    """Grows by an entry when the applications are deleted."""
    calls: list[str] = []
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(app, "undeploy", lambda: calls.append("undeployed"))
    return calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_deletes_the_applications_and_ends_without_an_error(monkeypatch, undeployed, number):
    monkeypatch.setattr(app, "deploy", lambda config: "http://127.0.0.1:1")
    threading.Timer(0.3, signal.raise_signal, [number]).start()
    job.run(CONFIG)
    assert undeployed == ["undeployed"]


def test_a_signal_ends_a_deployment_that_is_not_ready(monkeypatch, undeployed):
    applications, deleted, stopped = {"other", "main"}, set(), []
    monkeypatch.setattr(app.serve, "status", lambda: SimpleNamespace(applications=applications - deleted))
    monkeypatch.setattr(app.serve, "delete", deleted.add)
    monkeypatch.setattr(app, "_stop_serve", lambda: stopped.append("Serve"))

    def deploy(before: set[str]) -> None:
        with app._nothing_left_behind(before):
            app._wait(lambda: "value-brief: deploying", 60)

    for before, is_stopped in (({"other"}, False), (set(), True)):
        deleted.clear()
        monkeypatch.setattr(app, "deploy", lambda config, before=before: deploy(before))
        threading.Timer(0.3, signal.raise_signal, [signal.SIGTERM]).start()
        began = time.monotonic()
        job.run(CONFIG)
        assert deleted == applications - before
        assert bool(stopped) is is_stopped
        assert time.monotonic() - began < 30
    assert not undeployed  # a deployment that fails removes what it made, and nothing of a service that runs


def test_the_errors_of_cleaning_up_do_not_replace_the_first(monkeypatch):
    stopped = []

    def failing(*_: object) -> None:
        raise ConnectionError("no controller")

    monkeypatch.setattr(app.serve, "status", failing)
    monkeypatch.setattr(app, "_stop_serve", lambda: stopped.append("Serve") or failing())
    with pytest.raises(app.DeployError, match="no room"), app._nothing_left_behind(set()):
        raise app.DeployError("no room")
    assert stopped == ["Serve"]


@pytest.mark.parametrize("name", ["Ann's model", 'a "b" $HOME'])
def test_the_example_is_a_command_of_a_shell(name):
    served = CONFIG.serve.model_copy(update={"served_model_name": name})
    _, _, command = job.example(CONFIG.model_copy(update={"serve": served}), "http://h:1").partition("\n")
    arguments = shlex.split(command.replace("\\\n", ""))
    assert arguments[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert json.loads(arguments[arguments.index("-d") + 1])["model"] == name
