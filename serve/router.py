"""How Serve chooses a base replica."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve.messages import Admission, Feed


# Without FIFOMixin, Serve finds a call by the id of the HTTP request that it is made for: of several answers to one
# request, all except one would never be routed. With it, calls that are routed at the same moment may swap replicas.
class AnotherReplicaRouter(FIFOMixin, RequestRouter):
    """Two random replicas, of which Serve takes the less busy one; never one that was full, if there is another.

    A feed goes to the replica that it names.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        avoided = wanted = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # between rounds in which no replica accepts
            avoided = next((arg.avoid for arg in pending_request.args if isinstance(arg, Admission)), "")
            wanted = next((arg.replica for arg in pending_request.args if isinstance(arg, Feed)), "")
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != avoided]
        candidates = named or others or candidate_replicas
        return [random.sample(candidates, min(2, len(candidates)))]
