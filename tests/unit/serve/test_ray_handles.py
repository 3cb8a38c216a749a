"""How the gateway handles the loss of a base replica, as Ray reports it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("ray.serve")
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from mavis_dist.decode import Request
from serve.gateway.protocol import ApiError
from serve.gateway.replica import Gateway
from serve.messages import ANYBODY, AnswerFailed, BaseLost, EngineStopped
from serve.ray_handles import base_streams


class Handle:
    """A deployment whose every call fails."""

    def __init__(self, error: Exception):
        self._error, self.num_cancelled = error, 0

    def options(self, **_) -> Handle:
        return self

    @property
    def stream(self) -> Handle:
        return self

    load = stream

    def remote(self, *_) -> Handle:
        return self

    async def __aiter__(self) -> AsyncIterator[object]:
        raise self._error
        yield

    def __await__(self) -> Iterator[object]:
        raise self._error
        yield

    def cancel(self) -> None:
        self.num_cancelled += 1


async def read(handle: Handle) -> None:
    async for _ in base_streams(handle)(Request("r", (1,)), ANYBODY):
        pass


def as_ray_raises(error: Exception) -> Exception:
    return RayTaskError("stream", "Traceback ...", error).as_instanceof_cause()


@pytest.mark.parametrize("error", [ActorDiedError(), as_ray_raises(EngineStopped("the engine's thread has ended"))])
def test_a_dead_replica_and_a_stopped_engine_count_as_lost(error):
    handle = Handle(error)
    with pytest.raises(BaseLost):
        asyncio.run(read(handle))
    assert handle.num_cancelled == 1


def test_answers_fail_when_serve_has_given_up_its_replicas():
    unavailable = DeploymentUnavailableError(DeploymentID("Base", "main"))
    with pytest.raises(AnswerFailed, match="do not start"):
        asyncio.run(read(Handle(unavailable)))


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        as_ray_raises(EngineStopped("the engine's thread has ended")),
        DeploymentUnavailableError(DeploymentID("Base", "main")),
    ],
)
def test_health_is_503_without_a_working_base_replica(error):
    gateway = object.__new__(Gateway)
    gateway._base = Handle(error)
    with pytest.raises(ApiError) as refused:
        asyncio.run(gateway._base_load())
    assert (refused.value.status, refused.value.code) == (503, "engine_unavailable")


def test_other_errors_of_a_replica_do_not_count_as_its_loss():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(read(Handle(as_ray_raises(ZeroDivisionError("ours")))))
