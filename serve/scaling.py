"""How many replicas a deployment has: a fixed count, or as many as its load requires.

Ray's own measure, requests under way, is of little use here: a request takes one row or many, and lasts for seconds or
minutes. So replicas report their load themselves (`record_autoscaling_stats`): 1 is the capacity of one replica, and
waiting work counts, too.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from mavis_dist.sections import bounds
from serve.settings import Arguments

LOAD = "load"
REPORT_EVERY_S = 2.0
AVERAGED_OVER_S = 10.0


def replica_options(args: Arguments) -> dict[str, Any]:
    """Options of a deployment. A fixed count disables autoscaling, which would undo scaling by hand."""
    if is_fixed(args):
        return {"num_replicas": bounds(args.replicas).min}
    scaling = AutoscalingConfig(
        min_replicas=bounds(args.replicas).min,
        max_replicas=bounds(args.replicas).max,
        target_ongoing_requests=args.target_load,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        metrics_interval_s=REPORT_EVERY_S,  # deprecated, but the variables that replace it have no effect yet
        look_back_period_s=AVERAGED_OVER_S,
        policy=AutoscalingPolicy(policy_function=f"{__name__}:by_load"),
    )
    return {"autoscaling_config": scaling}


def is_fixed(args: Arguments) -> bool:
    return bounds(args.replicas).min == bounds(args.replicas).max


def by_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: total load over target load per replica; Serve applies bounds and delays."""
    loads = (context.aggregated_metrics or {}).get(LOAD)
    if not loads:  # none reported yet
        return context.target_num_replicas, {}
    assert context.config is not None
    return sum(loads.values()) / context.config.target_ongoing_requests, {}
