"""This project's engine with several guides and scorers, and the paper's procedure written plainly."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mavis_dist.environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: split
import torch

from benchmarks.common import lines, workload
from benchmarks.common.workload import Workload, weight_settings
from benchmarks.decode import naive
from mavis_dist.decode import Engine, LocalGuide, Scorer
from mavis_dist.types import RESIDUAL_CAP, TILT_CAP


def load(options: dict[str, Any]) -> dict[str, lines.Decode]:
    torch.set_num_threads(options["threads"])
    return make_variants(workload.load(Path(options["run"])), options["max_rows"])


def make_variants(work: Workload, max_rows: int) -> dict[str, lines.Decode]:
    """All variants but the reference share one engine: a value model without weight in a request costs nothing."""
    reference = _reference(work)  # before the engine, which rearranges the weights of its models
    model = next(iter(work.models.values()))
    heads = {"first head": (model, 0), "second head": (model, 0)}
    engine = Engine(work.endless, LocalGuide({**work.models, **heads}, work.students), max_rows=max_rows)
    guided = {
        "unguided": ((), Scorer.FULL),
        **{f"lazy_{count}": ([*work.models][:count], Scorer.LAZY) for count in (1, 2, 4)},
        "lazy_2_heads": ([*heads], Scorer.LAZY),
        "full_2": ([*work.models][:2], Scorer.FULL),
    }
    if work.students:
        for scorer in (Scorer.PREDICTED, Scorer.QHEAD):
            guided[f"{scorer.value}_{len(work.students)}"] = ([*work.students], scorer)
    variants = {name: _guided(work, engine, objectives, scorer) for name, (objectives, scorer) in guided.items()}
    return {**variants, "reference": reference}


def _guided(work: Workload, engine: Engine, objectives: Sequence[str], scorer: Scorer) -> lines.Decode:
    cap = None if scorer is Scorer.FULL else TILT_CAP

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        asked = replace(work, prompts=[tuple(prompt) for prompt in prompts])
        requests = asked.requests(len(prompts), weight_settings(objectives), tokens, scorer, cap, RESIDUAL_CAP)
        return sum(len(choice.tokens) for choices in engine.generate(requests) for choice in choices)

    return decode


def _reference(work: Workload) -> lines.Decode:
    base = replace(work.endless, model=deepcopy(work.endless.model))
    models = {name: deepcopy(model) for name, model in work.models.items()}

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        asked = replace(work, prompts=[tuple(prompt) for prompt in prompts])
        requests = asked.requests(len(prompts), weight_settings([*work.models][:2]), tokens)
        return sum(len(naive.answer(base, models, request)) for request in requests)

    return decode


if __name__ == "__main__":
    lines.serve("torch", load)
