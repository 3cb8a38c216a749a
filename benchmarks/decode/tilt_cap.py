"""Cost and savings of the tilt cap, on answers of the lazy scorer.

The exact distributions are computed without engine and guides, by separate forward passes over all candidates.

Shapes: T steps of an answer, K candidates, N = T * K, M objectives, S tokens before the last step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common.workload import Workload
from mavis_dist.core.tilt import candidates, tilt
from mavis_dist.decode import Engine, LocalGuide, Request, Scorer
from mavis_dist.models.load import BaseModel
from mavis_dist.models.masks import attention_masks
from mavis_dist.models.value import ValueModel

NOTABLE_EOS = 1e-4  # end-of-answer tokens are compared where the base model's probability exceeds this
MAX_TOKENS = 48  # per answer


@dataclass(frozen=True)
class Steps:
    """Everything that the token distributions of one answer depend on."""

    ids_TK: torch.Tensor
    logprobs_TK: torch.Tensor
    is_eos_TK: torch.Tensor
    values_TKM: torch.Tensor  # V_m(s∘a)
    baseline_TM: torch.Tensor  # V_m(s)
    weights_M: torch.Tensor
    beta: float

    def distribution(self, cap: float) -> torch.Tensor:
        """The next-token distribution [T, K] at temperature 1 under a cap on the tilt."""
        num_steps = len(self.ids_TK)
        delta_TK = tilt(
            self.values_TKM,
            self.baseline_TM,
            self.weights_M.expand(num_steps, -1),
            torch.full((num_steps,), self.beta),
            torch.full((num_steps,), cap),
            self.is_eos_TK,
        )
        return torch.softmax(self.logprobs_TK + delta_TK, -1)

    def divergence(self, cap: float) -> float:
        """KL from the candidates' base distribution, summed over all steps; nats."""
        return divergence(self.distribution(cap), self.logprobs_TK)


def divergence(probs_TK: torch.Tensor, logprobs_TK: torch.Tensor) -> float:
    """KL from the candidates' base distribution, summed over all steps; nats."""
    cross_TK = torch.where(probs_TK > 0, probs_TK * logprobs_TK, 0.0)
    return float((torch.special.xlogy(probs_TK, probs_TK) - cross_TK).sum())


@torch.inference_mode()
def replay(base: BaseModel, models: Mapping[str, ValueModel], request: Request, tokens: Sequence[int]) -> Steps:
    """Recompute the steps of an answer with value models of one head; the weights of the request must sum to 1."""
    ids_TK, logprobs_TK = _candidates(base, request, tokens)
    valued = [_values(models[name], request.prompt, ids_TK, tokens) for name in request.weights]
    return Steps(
        ids_TK=ids_TK,
        logprobs_TK=logprobs_TK,
        is_eos_TK=torch.isin(ids_TK, torch.tensor(base.eos_ids)),
        values_TKM=torch.stack([values_TK for values_TK, _ in valued], -1),
        baseline_TM=torch.stack([baseline_T for _, baseline_T in valued], -1),
        weights_M=torch.tensor(list(request.weights.values()), dtype=torch.float64),
        beta=request.beta,
    )


def _candidates(base: BaseModel, request: Request, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.tensor([[*request.prompt, *tokens[:-1]]])
    logits_TV = base.model(input_ids=inputs, logits_to_keep=len(tokens)).logits[0].float()
    logits_TV[0, list(base.eos_ids)] = float("-inf")  # an answer has at least one token
    params, like_T = request.params, torch.ones(len(tokens))
    top_k_T, top_p_T, min_p_T = params.top_k * like_T.long(), params.top_p * like_T, params.min_p * like_T
    return candidates(logits_TV, top_k_T, top_p_T, min_p_T, params.temperature * like_T)


def _values(
    model: ValueModel, prompt: Sequence[int], ids_TK: torch.Tensor, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """V(s∘a) of all candidates [T, K] and V(s) [T]: one forward pass over the answer, then one over all candidates, in
    which each attends to the tokens before its step and to itself.
    """
    cache = DynamicCache()
    inputs = torch.tensor([[*prompt, *tokens[:-1]]])
    baseline_T = model(input_ids=inputs, past_key_values=cache, use_cache=True)[0, -len(tokens) :, 0]
    position_N = (len(prompt) + torch.arange(len(tokens))).repeat_interleave(ids_TK.shape[1])
    is_before_NS = torch.arange(inputs.shape[1]) < position_N[:, None]
    seen_NS = torch.cat([is_before_NS, torch.eye(len(position_N), dtype=torch.bool)], -1)
    position_S = torch.cat([torch.arange(inputs.shape[1]), position_N])
    values_N = model(
        input_ids=ids_TK.reshape(1, -1),
        position_ids=position_N[None],
        attention_mask=attention_masks(model.backbone, seen_NS[None], position_N[None], position_S[None, None]),
        past_key_values=cache,
        use_cache=True,
    )[0, :, 0]
    return values_N.reshape(ids_TK.shape), baseline_T


def measure(workload: Workload, caps: Sequence[float], num_prompts: int) -> list[dict[str, Any]]:
    """One entry per cap and setting of the weights (each objective alone, and both equally)."""
    settings = {name: {name: 1.0} for name in workload.objectives}
    settings[" + ".join(workload.objectives)] = dict.fromkeys(workload.objectives, 1 / len(workload.objectives))
    engine = Engine(workload.base, LocalGuide(workload.models), max_rows=num_prompts)
    return [
        {"weights": name, "cap": cap}
        | _measure(workload, engine, cap, workload.requests(num_prompts, [weights], MAX_TOKENS, Scorer.LAZY, cap))
        for name, weights in settings.items()
        for cap in caps
    ]


def _measure(workload: Workload, engine: Engine, cap: float, requests: Sequence[Request]) -> dict[str, float]:
    choices = [choices[0] for choices in engine.generate(requests)]
    pairs = zip(requests, choices, strict=True)
    steps = [replay(workload.base, workload.models, request, choice.tokens) for request, choice in pairs]
    differences = [_differences(s, cap) for s in steps]
    variation = [x for variation, _ in differences for x in variation]
    eos = [x for _, eos in differences for x in eos]
    return {
        "candidates_per_token": statistics.fmean(n for choice in choices for n in choice.num_scored),
        "tv": statistics.fmean(variation),
        "tv_eos": statistics.fmean(eos) if eos else 0.0,
        "divergence_ratio": sum(choice.divergence for choice in choices) / sum(s.divergence(cap) for s in steps),
        "steps": len(variation),
        "eos_steps": len(eos),
    }


def _differences(steps: Steps, cap: float) -> tuple[list[float], list[float]]:
    """Per step, total variation between the distributions with and without the cap; and the difference in the
    probability of ending the answer, at steps where the base model's exceeds NOTABLE_EOS.
    """
    difference_TK = steps.distribution(cap) - steps.distribution(float("inf"))
    is_notable_T = torch.where(steps.is_eos_TK, steps.logprobs_TK.exp(), 0.0).sum(-1) > NOTABLE_EOS
    eos_T = torch.where(steps.is_eos_TK, difference_TK, 0.0).sum(-1).abs()
    return (difference_TK.abs().sum(-1) / 2).tolist(), eos_T[is_notable_T].tolist()
