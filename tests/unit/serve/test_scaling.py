"""The number of replicas that a load requires, and the options given to Serve."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("ray.serve")
from ray.serve.config import AutoscalingConfig

from mavis_dist.config import parse
from serve.messages import Call
from serve.scaling import LOAD, by_load, is_fixed, replica_options
from serve.settings import MainArgs, ValueArgs, main_args
from serve.value.replica import Value
from tests.tiny import write_models

LOADS = st.lists(st.floats(0.01, 5), min_size=1, max_size=8)


def context(loads: list[float], target: float = 1.0, running: int = 1) -> SimpleNamespace:
    """What Serve tells a policy of replicas of which some have told their load."""
    metrics = {LOAD: dict(enumerate(loads))} if loads else {}
    config = SimpleNamespace(target_ongoing_requests=target)
    return SimpleNamespace(aggregated_metrics=metrics, config=config, target_num_replicas=running)


@given(LOADS, st.floats(0.1, 2))
def test_the_policy_requests_the_fewest_replicas_that_bear_the_load(loads, target):
    asked = math.ceil(by_load(context(loads, target))[0])
    assert sum(loads) <= asked * target * (1 + 1e-9)
    assert sum(loads) > (asked - 1) * target * (1 - 1e-9)


def test_without_reports_nothing_changes():
    assert by_load(context([], running=3))[0] == 3
    assert by_load(context([0.0, 0.0], running=3))[0] == 0


def test_a_fixed_count_disables_autoscaling_and_a_range_enables_it():
    assert replica_options(MainArgs(run="r", replicas=3)) == {"num_replicas": 3}
    assert is_fixed(MainArgs(run="r", replicas={"min": 2, "max": 2}))
    args = MainArgs(run="r", replicas={"min": 2, "max": 5}, target_load=0.5, upscale_delay_s=1, downscale_delay_s=2)
    assert not is_fixed(args)
    scaling: AutoscalingConfig = replica_options(args)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (1, 2)
    # The controller gets the policy as bytes.
    asked, _ = scaling.policy.get_policy()(context([1.0, 0.5], scaling.target_ongoing_requests))
    assert asked == 3


@pytest.mark.parametrize("replicas", [0, 1.5, "two", {"min": 3, "max": 2}, {"min": 0, "max": 2}, {"max": 2}])
def test_other_numbers_of_replicas_are_refused(replicas):
    with pytest.raises(ValidationError, match="replicas"):
        ValueArgs(run="r", objective="brief", replicas=replicas)


def test_there_is_work_for_every_value_replica():
    serve = {"base_replicas": {"min": 2, "max": 4}, "value_replicas": {"min": 1, "max": 5}}
    config = parse({"run": "r", "objectives": {"a": {"reward": "brevity"}}, "serve": serve})
    assert main_args(config).value_sessions == 3


def test_a_value_replica_reports_its_load(tmp_path):
    write_models(tmp_path, "run", ("brief",))
    replica = Value(ValueArgs(storage=str(tmp_path / "runs"), run="run", objective="brief", dtype="float32"))

    async def load(calls: int) -> float:
        await asyncio.gather(*(replica.answer(Call("s", version="brief@i0")) for _ in range(calls)))
        return (await replica.record_autoscaling_stats())[LOAD]

    assert asyncio.run(load(0)) == 0
    # As many as wait for each other count, so that it may be more than 1.
    assert 0 < asyncio.run(load(8)) <= 8
    assert asyncio.run(load(0)) == 0
