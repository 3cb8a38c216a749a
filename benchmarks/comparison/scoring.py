"""Log-probabilities of answers in TRL's trainers, without those of prompts and padding.

Where Triton runs, TRL does the same; elsewhere it scores all positions, half the time of a training step on a CPU.

Shapes: B rows, T positions, D features, N tokens of answers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from trl.trainer.utils import FusedCausalLMOutput


def score_answers_only(model: Any) -> None:
    """Replace the scoring that TRL has patched into the base model of an adapter."""
    policy = model.get_base_model()
    original = policy.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return original(*args, labels=labels, **kwargs)
        hidden_BTD = policy.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        targets_BT, hidden_BTD = labels[:, 1:], hidden_BTD[:, :-1]
        is_scored_BT = targets_BT != -100
        logits_NV = policy.get_output_embeddings()(hidden_BTD[is_scored_BT])
        targets_N = targets_BT[is_scored_BT]
        logprobs_N = -functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        logprobs_BT = logprobs_N.new_zeros(targets_BT.shape).masked_scatter(is_scored_BT, logprobs_N)
        is_top_N = logits_NV.detach().argmax(-1) == targets_N
        return FusedCausalLMOutput(
            loss=-logprobs_N.mean(),
            log_probs=logprobs_BT,
            entropy=-logprobs_BT.detach(),  # an estimate, for TRL's metrics, as are the next two
            mean_logits=torch.zeros_like(logprobs_BT),
            is_top1=torch.zeros_like(is_scored_BT).masked_scatter(is_scored_BT, is_top_N),
            label_mask=is_scored_BT,
        )

    policy.forward = forward
