"""How many replicas a deployment has: a fixed number, or as many as their load asks for.

Ray's own measure, requests under way, says little here: a request takes one row or many, and lasts for seconds or
minutes. So replicas tell their load themselves (`record_autoscaling_stats`): 1 is all that one can do at a time, and
what waits for it counts, too.
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
    """Of a deployment. Where the number is fixed there is no autoscaler: it would undo what others scale."""
    if is_fixed(args):
        return {"num_replicas": bounds(args.replicas).min}
    scaling = AutoscalingConfig(
        min_replicas=bounds(args.replicas).min,
        max_replicas=bounds(args.replicas).max,
        target_ongoing_requests=args.target_load,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        metrics_interval_s=REPORT_EVERY_S,  # deprecated, but the variables that are to replace it have no effect yet
        look_back_period_s=AVERAGED_OVER_S,
        policy=AutoscalingPolicy(policy_function=f"{__name__}:by_load"),
    )
    return {"autoscaling_config": scaling}


def is_fixed(args: Arguments) -> bool:
    return bounds(args.replicas).min == bounds(args.replicas).max


def by_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: replicas that would bear the load of all at the target; Serve adds bounds, delays."""
    loads = (context.aggregated_metrics or {}).get(LOAD)
    if not loads:  # none has told it yet
        return context.target_num_replicas, {}
    assert context.config is not None
    return sum(loads.values()) / context.config.target_ongoing_requests, {}
