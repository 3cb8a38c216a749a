"""Log-probabilities of answers in TRL's trainers, on the support that answers are sampled from.

A policy is sampled on the base model's truncated support (`mixture`). Over the whole vocabulary, training would push
probability to tokens that are never sampled: nothing brings it back, and RL drifts away after some steps.

Prompts and padding are left out. Where Triton runs, TRL does that too; elsewhere it scores all positions, half the time
of a training step on a CPU.

Shapes: B rows, T positions, D features, N tokens of answers, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.utils import FusedCausalLMOutput

from mavis_dist.core.tilt import Filters, largest, renormalised
from mavis_dist.decode import SamplingParams

IGNORED = -100  # label of what is not scored


def score_on_support(model: Any, params: SamplingParams, eos_ids: Sequence[int]) -> None:
    """Replace the scoring that TRL has patched into the base model of an adapter.

    Args:
        params: their top_k, top_p and min_p define the support.
        eos_ids: tokens that no answer begins with.
    """
    policy = model.get_base_model()
    original = policy.forward
    head = policy.get_output_embeddings()

    def hidden(is_scored_BT: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found_BTD = policy.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        found_ND: torch.Tensor = found_BTD[:, :-1][is_scored_BT]
        return found_ND

    @torch.no_grad()
    def support(starts_N: torch.Tensor, base_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates by descending probability: ids [N, K], and whether each is in the support."""
        logits_NV = head(base_ND)
        logits_NV[:, eos_ids] = logits_NV[:, eos_ids].masked_fill(starts_N[:, None], float("-inf"))
        filters = filters_of(params, len(logits_NV), logits_NV.device)
        logits_NK, ids_NK = largest(logits_NV, filters.num_candidates)
        return ids_NK, renormalised(logits_NK, filters) > float("-inf")

    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return original(*args, labels=labels, **kwargs)
        targets_BT = labels[:, 1:]
        is_scored_BT = targets_BT != IGNORED
        policy_ND = base_ND = hidden(is_scored_BT, *args, **kwargs)
        if not _is_disabled(model):
            with torch.no_grad(), model.disable_adapter():
                base_ND = hidden(is_scored_BT, *args, **kwargs)
        is_first_BT = is_scored_BT & (is_scored_BT.cumsum(1) == 1)
        ids_NK, is_present_NK = support(is_first_BT[is_scored_BT], base_ND)
        targets_N = targets_BT[is_scored_BT]
        # Kernels of other shapes round otherwise: a sampled token belongs to the support whatever this pass says.
        ids_NK, is_present_NK = _with(targets_N, ids_NK, is_present_NK)
        logits_NK = torch.einsum("nkd,nd->nk", head.weight[ids_NK].float(), policy_ND.float())
        logprobs_NK = logits_NK.masked_fill(~is_present_NK, float("-inf")).log_softmax(-1)
        logprobs_N = logprobs_NK[:, -1]
        logprobs_BT = logprobs_N.new_zeros(targets_BT.shape).masked_scatter(is_scored_BT, logprobs_N)
        is_top_N = logprobs_N.detach() == logprobs_NK.detach().amax(-1)
        return FusedCausalLMOutput(
            loss=-logprobs_N.mean(),
            log_probs=logprobs_BT,
            entropy=-logprobs_BT.detach(),  # an estimate, for TRL's metrics, as are the next two
            mean_logits=torch.zeros_like(logprobs_BT),
            is_top1=torch.zeros_like(is_scored_BT).masked_scatter(is_scored_BT, is_top_N),
            label_mask=is_scored_BT,
        )

    policy.forward = forward


def filters_of(params: SamplingParams, num_rows: int, device: torch.device) -> Filters:
    """The support of rows that all have the same parameters, at temperature 1."""
    rows = [1.0] * num_rows
    limits = [params.top_k] * num_rows, [params.top_p] * num_rows, [params.min_p] * num_rows
    return Filters.of(*limits, rows, device)


def _with(
    targets_N: torch.Tensor, ids_NK: torch.Tensor, is_present_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same candidates with the targets as the last one, and nowhere else."""
    targets_N1 = targets_N[:, None]
    others_NK = is_present_NK & (ids_NK != targets_N1)
    return torch.cat([ids_NK, targets_N1], 1), torch.cat([others_NK, torch.ones_like(targets_N1, dtype=torch.bool)], 1)


def _is_disabled(model: Any) -> bool:
    """Whether the adapters of a model take no part, as in the passes of a reference."""
    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
