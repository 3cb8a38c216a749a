"""Quality of a student's predictions on answers that it steered: its token distributions against the value models'.

Shapes: T steps of an answer, K candidates, M objectives, R rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.workload import Workload
from benchmarks.decode.tilt_cap import MAX_TOKENS, NOTABLE_EOS, Steps, replay
from mavis_dist.core.tilt import tilt
from mavis_dist.decode import Engine, LocalGuide, Request, Scorer
from mavis_dist.models.qhead import Student, predicted


def measure(workload: Workload, cap: float, num_prompts: int) -> list[dict[str, Any]]:
    """One entry per setting of the weights (each objective alone, and both equally); empty without a student."""
    engine = Engine(workload.base, LocalGuide(workload.models, workload.students), max_rows=num_prompts)
    return [
        {"weights": name, "cap": cap}
        | _measure(workload, engine, cap, workload.requests(num_prompts, [weights], MAX_TOKENS, Scorer.QHEAD, cap))
        for name, weights in student_settings(workload).items()
    ]


def student_settings(workload: Workload) -> dict[str, dict[str, float]]:
    """Settings of the weights for which there is a student: each objective alone, and all equally."""
    names = [name for name in workload.objectives if name in workload.students]
    settings = {name: {name: 1.0} for name in names}
    return settings | ({" + ".join(names): dict.fromkeys(names, 1 / len(names))} if len(names) > 1 else {})


def _measure(workload: Workload, engine: Engine, cap: float, requests: Sequence[Request]) -> dict[str, float]:
    choices = [choices[0] for choices in engine.generate(requests)]
    exact = [replay(workload.base, workload.models, r, c.tokens) for r, c in zip(requests, choices, strict=True)]
    triples = zip(exact, requests, choices, strict=True)
    pairs = [(steps, predict(workload.students, r, c.tokens, steps)) for steps, r, c in triples]
    difference_TK = [ours.distribution(cap) - steps.distribution(cap) for steps, ours in pairs]
    eos = [x for (steps, _), d_TK in zip(pairs, difference_TK, strict=True) for x in _eos_differences(steps, d_TK)]
    return {
        "tv": statistics.fmean(x for d_TK in difference_TK for x in (d_TK.abs().sum(-1) / 2).tolist()),
        "tv_eos": statistics.fmean(eos) if eos else 0.0,
        "correlation": _correlation(pairs),
        "divergence_ratio": sum(o.divergence(cap) for _, o in pairs) / sum(s.divergence(cap) for s, _ in pairs),
        "soft_value_ratio": sum(_soft_value(s, o.distribution(cap), cap) for s, o in pairs)
        / sum(_soft_value(s, s.distribution(cap), cap) for s, _ in pairs),
        "steps": sum(len(d_TK) for d_TK in difference_TK),
    }


@torch.inference_mode()
def predict(
    students: Mapping[str, tuple[Student, int]], request: Request, tokens: Sequence[int], steps: Steps
) -> Steps:
    """The same steps with the values that the objectives' shared student predicts."""
    student = students[next(iter(request.weights))][0]
    places = [students[name][1] for name in request.weights]
    inputs = torch.tensor([[*request.prompt, *tokens[:-1]]])
    values_TM, queries_TMR = student.split(student(input_ids=inputs)[0, -len(tokens) :])
    num_candidates = steps.ids_TK.shape[1]
    queries_NMR = queries_TMR.repeat_interleave(num_candidates, 0)
    deltas_NM = predicted(queries_NMR, student.token_factors(steps.ids_TK.flatten()))
    deltas_TKM = deltas_NM.unflatten(0, (-1, num_candidates))
    return replace(steps, values_TKM=(values_TM[:, None] + deltas_TKM)[..., places], baseline_TM=values_TM[:, places])


def uncapped(steps: Steps) -> torch.Tensor:
    """The tilt [T, K] without a cap."""
    return _delta(steps, float("inf"))


def _delta(steps: Steps, cap: float) -> torch.Tensor:
    num_steps = len(steps.ids_TK)
    beta_T, cap_T = torch.full((num_steps,), steps.beta), torch.full((num_steps,), cap)
    weights_TM = steps.weights_M.expand(num_steps, -1)
    return tilt(steps.values_TKM, steps.baseline_TM, weights_TM, beta_T, cap_T, steps.is_eos_TK)


def _soft_value(steps: Steps, probs_TK: torch.Tensor, cap: float) -> float:
    """The soft value of a distribution under the value models: expected tilt minus KL, summed over the steps; nats."""
    logratios_TK = torch.where(probs_TK > 0, probs_TK.log() - steps.logprobs_TK, 0.0)
    return float((probs_TK * (_delta(steps, cap) - logratios_TK)).sum())


def _correlation(pairs: Sequence[tuple[Steps, Steps]]) -> float:
    """Correlation of the uncapped tilts over all candidates of all steps, weighted by the base model's probability."""
    exact_N, ours_N = (torch.cat([uncapped(pair[i]).flatten() for pair in pairs]) for i in (0, 1))
    weight_N = torch.cat([steps.logprobs_TK.exp().flatten() for steps, _ in pairs])
    covariance = torch.cov(torch.stack([exact_N, ours_N]), aweights=weight_N)
    return float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())


def _eos_differences(steps: Steps, difference_TK: torch.Tensor) -> list[float]:
    """|difference in the probability of ending the answer|, at steps where the base model's exceeds NOTABLE_EOS."""
    base_T = torch.where(steps.is_eos_TK, steps.logprobs_TK.exp(), 0.0).sum(-1)
    return torch.where(steps.is_eos_TK, difference_TK, 0.0).sum(-1).abs()[base_T > NOTABLE_EOS].tolist()
