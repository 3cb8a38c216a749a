"""The service without Ray, for all modules that speak HTTP to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.local import LocalService


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    from tests.local import LocalService

    service = LocalService(tmp_path_factory.mktemp("local"))
    yield service
    service.loop.stop()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two objectives, in single precision."""
    from tests.tiny import write_run

    return write_run(tmp_path_factory.mktemp("finished"), "run", ("brief", "positive"))


@pytest.fixture(scope="module")
def run_url(finished_run: Path) -> Iterator[str]:
    """The address of a service of the finished run."""
    from tests.local import RunService, listening

    service = RunService(finished_run)
    with listening(service.app()) as url:
        yield url
    service.loop.stop()
