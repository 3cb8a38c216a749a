"""Scorers: which candidates are given to the value models before a token is chosen.

`full` evaluates all of C, as published. `lazy` evaluates candidates in the order in which they can win, in growing
chunks, and stops when the best one so far beats whatever the bound on the tilt leaves to the others: the same token as
`full` with the same cap, for a fraction of the work. A scorer is a schedule of chunks; everything else is shared.

Shapes: B rows, G guided rows, K candidates in evaluation order, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mavis_dist.core.tilt import divergence, estimate_divergence, is_settled, log_partition, tilt
from mavis_dist.decode.guide import Guide

FIRST_CHUNK = 4  # beside the end-of-answer tokens; the fixed sample that divergence is estimated from
LATER_CHUNKS = (4, 4, 4, 8, 16)


@dataclass(frozen=True)
class Drafts:
    """The candidates of all rows, in evaluation order."""

    ids_BK: torch.Tensor
    logprobs_BK: torch.Tensor  # -inf where a row has no such candidate
    phi_BK: torch.Tensor  # log p + T * G
    is_eos_BK: torch.Tensor
    temperature_B: torch.Tensor


@dataclass(frozen=True)
class Guided:
    """What steers the guided rows."""

    places: list[int]  # b of each
    numbers: list[int]  # the guide's names for them
    is_lazy: list[bool]
    weights_GM: torch.Tensor
    baseline_GM: torch.Tensor  # V_m(s)
    beta_G: torch.Tensor
    cap_G: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """The tilt of all rows, and what it was computed from."""

    delta_BK: torch.Tensor  # -inf where not evaluated: such a candidate cannot win
    values_BKM: torch.Tensor  # nan where not asked for
    num_evaluated_B: torch.Tensor
    is_sound_B: torch.Tensor  # every value asked for was finite
    divergence_B: torch.Tensor  # KL(pi || p_T), nats; estimated for lazy rows
    log_partition_B: torch.Tensor  # log Z of the tilt; estimated for lazy rows


def score(drafts: Drafts, guided: Guided, guide: Guide | None, num_eos: int) -> Scores:
    """Ask the guide as each row's scorer wants; rows without guidance have no tilt.

    `num_eos` is the number of end-of-answer tokens that the model has: the first chunk has room for all of them.
    """
    num_rows, num_candidates = drafts.ids_BK.shape
    num_objectives = guided.weights_GM.shape[1]
    device = drafts.ids_BK.device
    delta_BK = torch.zeros_like(drafts.phi_BK)
    values_BKM = torch.full((num_rows, num_candidates, num_objectives), float("nan"), device=device)
    num_evaluated_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
    is_sound_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    divergence_B = torch.zeros_like(drafts.temperature_B).masked_fill(drafts.temperature_B == 0, float("nan"))
    log_partition_B = torch.zeros_like(divergence_B)

    for lazy, sizes in ((False, (num_candidates,)), (True, (num_eos + FIRST_CHUNK, *LATER_CHUNKS, num_candidates))):
        group = torch.tensor([g for g, is_lazy in enumerate(guided.is_lazy) if is_lazy == lazy], dtype=torch.int64)
        if not len(group):
            continue
        assert guide is not None
        places = torch.tensor(guided.places)[group]
        delta_BK[places] = float("-inf")
        for start, end in _spans(sizes, num_candidates):
            b = torch.tensor(guided.places)[group]
            # Where a row has fewer candidates, its first one stands in.
            present_CK = drafts.logprobs_BK[b, start:end] > float("-inf")
            ids_CK = torch.where(present_CK, drafts.ids_BK[b, start:end], drafts.ids_BK[b, :1])
            values_CKM = guide.score([guided.numbers[g] for g in group.tolist()], ids_CK).to(device)
            delta_CK = tilt(
                values_CKM,
                guided.baseline_GM[group],
                guided.weights_GM[group],
                guided.beta_G[group],
                guided.cap_G[group],
                drafts.is_eos_BK[b, start:end],
            )
            values_BKM[b, start:end] = values_CKM
            delta_BK[b, start:end] = delta_CK
            num_evaluated_B[b] += present_CK.sum(-1)
            is_used_CM = (guided.weights_GM[group] != 0)[:, None]
            # The tilt shows a V(s) that is not finite; an infinite V(s∘a) may hide behind the cap.
            is_sound_B[b] &= (values_CKM.isfinite() | ~is_used_CM).flatten(1).all(-1) & delta_CK.isfinite().all(-1)
            group = group[~is_settled(drafts.phi_BK[b], delta_BK[b], end, guided.cap_G[group]) & is_sound_B[b]]
            if not len(group):
                break
        logprobs, temperature = drafts.logprobs_BK[places], drafts.temperature_B[places]
        if lazy:
            divergence_B[places], log_partition_B[places] = estimate_divergence(
                logprobs, drafts.phi_BK[places], delta_BK[places, : sizes[0]], temperature, drafts.is_eos_BK[places]
            )
        else:
            divergence_B[places] = divergence(logprobs, delta_BK[places], temperature)
            log_partition_B[places] = log_partition(logprobs, delta_BK[places], temperature)
    return Scores(delta_BK, values_BKM, num_evaluated_B, is_sound_B, divergence_B, log_partition_B)


def _spans(sizes: Sequence[int], num_candidates: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, end) of chunks, up to the last candidate."""
    start = 0
    for size in sizes:
        end = min(start + size, num_candidates)
        if end > start:
            yield start, end
        start = end
