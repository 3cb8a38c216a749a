"""How many threads a base replica computes with."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve")

from serve.base import replica
from serve.settings import MainArgs


def args(**settings):
    return MainArgs(run="r", base="tiny", **settings)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({}, 3),  # a quarter of a core is reserved: no measure of what it needs
        ({"cpus": 0}, 3),
        ({"cpus": 1}, 1),
        ({"cpus": 2.5}, 2),
        ({"cpus": 12}, 12),
        ({"threads": 5}, 5),
        ({"cpus": 2, "threads": 5}, 5),
    ],
)
def test_threads_are_those_given_or_reserved_or_of_the_machine(monkeypatch, settings, threads):
    monkeypatch.setattr(replica.cluster, "cores_here", lambda: 6.0)
    assert replica.num_threads(args(**settings)) == threads


@pytest.mark.parametrize(("cores", "threads"), [(0.0, 1), (1.0, 1), (2.0, 1), (64.0, 8)])
def test_the_machine_bounds_them(monkeypatch, cores, threads):
    monkeypatch.setattr(replica.cluster, "cores_here", lambda: cores)
    assert replica.num_threads(args()) == threads
