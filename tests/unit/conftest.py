"""The service without Ray, for all modules that speak HTTP to it."""

from __future__ import annotations

from collections.abc import Iterator
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
