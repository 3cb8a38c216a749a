"""Which base replica a request is sent to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")

from serve.messages import Admission
from serve.router import AnotherReplicaRouter


def chosen(names: str, avoid: str | None) -> set[str]:
    """All that may be chosen among some replicas."""
    router = object.__new__(AnotherReplicaRouter)  # without a cluster
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]
    args = ["request"] if avoid is None else ["request", Admission(avoid=avoid)]
    pending = SimpleNamespace(args=args, routing_context=SimpleNamespace(should_backoff=False))
    seen = set()
    for _ in range(50):
        [candidates] = asyncio.run(router.choose_replicas(replicas, pending))
        assert len(candidates) == len({c.replica_id.unique_id for c in candidates}) <= 2
        seen |= {c.replica_id.unique_id for c in candidates}
    return seen


@pytest.mark.parametrize(
    ("names", "avoid", "expected"),
    [
        ("abc", "", "abc"),
        ("abc", None, "abc"),  # a call without terms, such as for the load
        ("abc", "b", "ac"),
        ("ab", "b", "a"),
        ("b", "b", "b"),
        ("ab", "gone", "ab"),
        ("", "b", ""),
    ],
)
def test_a_replica_that_was_full_is_avoided_where_there_is_another(names, avoid, expected):
    assert chosen(names, avoid) == set(expected)
