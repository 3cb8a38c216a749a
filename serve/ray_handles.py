"""Calls between deployments: the only place that knows how Ray reports a lost replica."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import grpc
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import ReplicaState

from mavis_dist.decode import Request, Update
from mavis_dist.store.values import objective_of
from serve.messages import (
    Admission,
    AnswerFailed,
    BaseLost,
    Call,
    EngineStopped,
    Feed,
    Message,
    OpenFeed,
    OpenStream,
    Pending,
    ReplicaLost,
    Reply,
)
from serve.settings import value_application

# By value, calls go over gRPC, which has errors of its own for a lost peer. A replica whose engine has stopped exists
# until Serve's next health check, but is of no use.
LOST = (RayActorError, grpc.RpcError, EngineStopped)

VALUE_DEPLOYMENT = "Value"


def value_replicas() -> dict[str, int]:
    """Running value replicas, by deployed objective."""
    prefix, running = value_application(""), {}
    for name, application in serve.status().applications.items():
        if name.startswith(prefix) and VALUE_DEPLOYMENT in application.deployments:
            states = application.deployments[VALUE_DEPLOYMENT].replica_states
            running[name.removeprefix(prefix)] = states.get(ReplicaState.RUNNING, 0)
    return running


class _PendingReply:
    def __init__(self, response: DeploymentResponse[Reply]):
        self._response = response

    def result(self, timeout_s: float) -> Reply:
        try:
            return self._response.result(timeout_s=timeout_s)
        except TimeoutError:
            self._response.cancel()
            raise
        # Errors of the replica's own code, too: its rows are reopened, and given up after a time.
        except Exception as error:
            raise ReplicaLost(_first_line(error)) from None


class ValueHandles:
    """The transport of RemoteGuide: one Serve application per objective, found by name, for all its versions."""

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def __call__(self, objective: str, session: str, call: Call) -> Pending:
        application = value_application(objective_of(objective))
        if application not in self._handles:
            # The application may be deployed after its caller, or return.
            self._handles[application] = serve.get_deployment_handle(VALUE_DEPLOYMENT, application, _check_exists=False)
        handle = self._handles[application].options(session_id=session, _by_reference=False)
        return _PendingReply(cast(DeploymentResponse[Reply], handle.answer.remote(call)))


def replica_name() -> str:
    """The name of this replica in serve.router; empty outside Serve."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""


def base_streams(handle: DeploymentHandle[Any]) -> OpenStream:
    """The messages of some base replica: the innermost layer of serve.gateway.streams.answer_stream."""
    streaming = handle.options(stream=True, _by_reference=False)

    def open_stream(request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        return _messages(lambda: streaming.stream.remote(request, admission))

    return open_stream


def base_feeds(handle: DeploymentHandle[Any]) -> OpenFeed:
    """The feed of the base replica that it names."""
    streaming = handle.options(stream=True, _by_reference=False)

    def open_feed(feed: Feed) -> AsyncGenerator[list[Update], None]:
        return _messages(lambda: streaming.feed.remote(feed))

    return open_feed


async def _messages(call: Callable[[], Any]) -> AsyncGenerator[Any, None]:
    response = cast(DeploymentResponseGenerator[Any], call())
    try:
        async for message in response:
            yield message
    except DeploymentUnavailableError:  # Serve has given up: waiting would not help
        raise AnswerFailed("the base replicas do not start; Serve's log says why") from None
    except LOST as error:
        raise BaseLost(_first_line(error)) from None
    finally:
        response.cancel()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
