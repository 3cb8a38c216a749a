"""Which failures of a training are losses of processes, and which would come again."""

from __future__ import annotations

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.distributed import DistBackendError, DistNetworkError

from mavis_dist.train.launch import raised_by_workers

NCCL = "NCCL error in: NCCLUtils.hpp:275, {}, NCCL version 2.27.5\nLast error:\n{}"


@pytest.mark.parametrize(
    "failure",
    [
        DistBackendError(NCCL.format("invalid usage (run with NCCL_DEBUG=WARN for details)", "Duplicate GPU detected")),
        DistBackendError(NCCL.format("invalid argument", "Invalid config")),
        DistBackendError("ncclInvalidUsage: This usually reflects invalid usage of NCCL library."),
        RuntimeError(NCCL.format("unhandled error", "Duplicate GPU detected : rank 0 and rank 1 both on 5000")),
        ValueError("no such thing"),
    ],
)
def test_what_would_come_again_is_raised(failure: Exception) -> None:
    assert raised_by_workers(WorkerGroupError("training failed", {0: failure})) is failure


@pytest.mark.parametrize(
    "failure",
    [
        DistBackendError(NCCL.format("remote process exited or there was a network error", "socketProgress failed")),
        DistBackendError("NCCL communicator was aborted on rank 0"),
        DistNetworkError("The client socket has timed out after 600000ms"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4711"),
        RuntimeError("[gloo/transport/tcp/pair.cc:144] setsockopt: Invalid argument"),
    ],
)
def test_lost_connections_are_worth_another_attempt(failure: Exception) -> None:
    assert raised_by_workers(WorkerGroupError("training failed", {0: failure})) is None
