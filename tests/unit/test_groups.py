"""What a group checks before it computes; groups themselves are tested on a cluster."""

from __future__ import annotations

import platform

import pytest

from mavis_dist.groups import _check_alike, bundles
from mavis_dist.types import UserError


def test_processes_that_differ_are_named() -> None:
    own = {"torch": "2.13.0", "transformers": "5.23.0"}
    _check_alike(own, [("b", own), ("c", {**own, "ray": "2.60.0"})])
    sentence = f"transformers is 5.23.0 on machine {platform.node()}, and 5.20.0 on machine c: make them the same"
    with pytest.raises(UserError) as caught:
        _check_alike(own, [("b", own), ("c", {**own, "transformers": "5.20.0"})])
    assert str(caught.value) == sentence


def test_every_process_of_a_group_reserves_something() -> None:
    assert bundles(3, 2, 1) == [{"CPU": 2, "GPU": 1}] * 3
    assert bundles(2, 0.5, 0) == [{"CPU": 0.5}] * 2
    [first, second] = bundles(2, 0, 0)
    assert first == second
    assert 0 < first["CPU"] < 0.01
