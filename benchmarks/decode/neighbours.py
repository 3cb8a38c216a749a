"""How many answers depend on what shares their batch: all together, and each by itself."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.common.workload import Workload, weight_settings
from mavis_dist.decode import Engine, LocalGuide, Request, Scorer
from mavis_dist.types import TILT_CAP

MAX_TOKENS, MAX_ROWS = 8, 32


def measure(workload: Workload, count: int) -> dict[str, int]:
    """Answers with other tokens, of so many, half of them guided by two value models."""
    models = {name: workload.models[name] for name in workload.objectives}
    requests = [_request(workload, list(models), i) for i in range(count)]
    together = Engine(workload.base, LocalGuide(models), max_rows=MAX_ROWS).generate(requests)
    alone = Engine(workload.base, LocalGuide(models), max_rows=1)
    different = sum(
        alone.generate([request])[0][0].tokens != choice.tokens
        for request, [choice] in zip(requests, together, strict=True)
    )
    return {"answers": count, "different": different}


def _request(workload: Workload, objectives: list[str], i: int) -> Request:
    """The i-th one: every prompt is asked again with other weights and another seed."""
    settings = [{}, *weight_settings(objectives)[:1], {}, *weight_settings(objectives)[1:2]]
    asked = replace(workload, prompts=[workload.prompts[i % len(workload.prompts)]])
    [request] = asked.requests(1, [settings[i % len(settings)]], MAX_TOKENS, Scorer.LAZY, TILT_CAP)
    return replace(request, id=str(i), params=replace(request.params, seed=i))
