"""Following a job over connections that break. Jobs themselves are tested on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import submit
from mavis_dist.types import UserError

LOG = "one\ntwo\nthree\n"


class Client:
    """A dashboard whose answers are given: an exception, or a status with how much of the log there is."""

    def __init__(self, *answers: Exception | tuple[str, int]):
        self._answers = list(answers)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        answer = self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        for character in LOG[: answer[1]]:
            yield character
        if answer[0] == "RUNNING":
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, name: str) -> Any:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status=answer[0], message="as it ends", metadata={})


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RETRY_S", 0.01)
    monkeypatch.setattr(submit, "GONE_S", 0.2)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", submit.FAILED)])
def test_a_broken_connection_does_not_end_the_following(
    end: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Client(
        ("RUNNING", 2), ("RUNNING", 6), ConnectionError("refused"), RuntimeError("500"), ("RUNNING", 9), (end, len(LOG))
    )
    assert submit.follow(client, "pipeline-r") == code
    told = capsys.readouterr()
    assert told.out == LOG
    assert f"{end.lower()}: as it ends" in told.err


@pytest.mark.usefixtures("hurry")
def test_a_dashboard_that_stays_away_is_one_line() -> None:
    client: Any = Client(("RUNNING", 2), ConnectionError("refused"))
    with pytest.raises(UserError, match=r"pipeline-r: .* does not answer: refused; pipeline-r goes on; --stop"):
        submit.follow(client, "pipeline-r")


def interrupted(client: Any, name: str, printed: int) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_ends_the_following_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(submit, "_print_log", interrupted)
    client: Any = Client(("RUNNING", 0))
    assert submit.follow(client, "pipeline-r") == 130
    assert "pipeline-r" in (told := capsys.readouterr().err)
    assert submit.GOES_ON in told


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Submits a job where another one of its name is known; its exit code and the client's other calls."""

    def run(job: str, status: str | None, same: bool, *, again: bool = False) -> tuple[int, list[str]]:
        calls = list[str]()
        given = argparse.Namespace(
            job=job,
            config="jobs/configs/quickstart.yaml",
            overrides=[],
            dashboard="",
            python="python",
            again=again,
            stop=False,
            no_wait=True,
        )
        settings = submit.settings_of(submit.entrypoint(given), submit.config_module.load(given.config))
        metadata = {submit.SETTINGS: settings if same else "other"}
        found = None if status is None else SimpleNamespace(status=status, message="", metadata=metadata)
        client = SimpleNamespace(
            get_job_info=lambda name: found,
            delete_job=lambda name: calls.append("delete"),
            submit_job=lambda **job: calls.append("submit" if job["metadata"][submit.SETTINGS] == settings else "?"),
        )
        monkeypatch.setattr(submit, "connect", lambda address: client)
        return submit.run(given), calls

    return run


@pytest.mark.parametrize(
    ("job", "status", "same", "calls"),
    [
        ("pipeline", "SUCCEEDED", True, []),
        ("pipeline", "SUCCEEDED", False, ["delete", "submit"]),  # such as one more iteration
        ("pipeline", "FAILED", True, ["delete", "submit"]),
        ("pipeline", "STOPPED", False, ["delete", "submit"]),
        ("pipeline", "RUNNING", True, []),
        ("check", "SUCCEEDED", True, ["delete", "submit"]),  # the machines may have changed
        ("serve", "SUCCEEDED", True, ["delete", "submit"]),
    ],
)
def test_a_job_is_done_only_if_it_was_the_same(
    submitted: Callable[..., tuple[int, list[str]]], job: str, status: str, same: bool, calls: list[str]
) -> None:
    assert submitted(job, status, same) == (0, calls)


def test_a_running_job_with_other_settings_is_refused(submitted: Callable[..., tuple[int, list[str]]]) -> None:
    with pytest.raises(UserError, match=r"pipeline-quickstart runs with other settings: .* run=NAME"):
        submitted("pipeline", "RUNNING", False)


def test_a_finished_job_is_repeated_where_that_is_asked_for(submitted: Callable[..., tuple[int, list[str]]]) -> None:
    assert submitted("pipeline", "SUCCEEDED", True, again=True) == (0, ["delete", "submit"])
