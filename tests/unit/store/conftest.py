"""An S3 server for the tests of storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, forget_connections, s3_server


@pytest.fixture(scope="module")
def running_s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running_s3: S3Server) -> Iterator[S3Server]:
    """The server, without faults before and after a test."""
    yield running_s3
    running_s3.fault = lambda _: None
    forget_connections()
