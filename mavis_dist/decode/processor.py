"""The tilt as a logits processor for transformers' `model.generate`. No decode loop.

Shapes: B rows, T tokens, V vocabulary, K candidates, M objectives with a weight, N candidates of all rows,
concatenated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from transformers import LogitsProcessor

from mavis_dist.core.tilt import candidates, tilt
from mavis_dist.decode.guide import Guide, GuideRow
from mavis_dist.decode.request import RequestError
from mavis_dist.decode.validate import normalise_weights
from mavis_dist.models.value import ValueModelError
from mavis_dist.types import TILT_CAP

Ids = tuple[int, ...]  # input ids of a row, padding included


@dataclass
class _Batch:
    """The state of the rows of one call; lists are in their order."""

    places: Mapping[Ids, Sequence[int]]  # indices in the batch; the same ids may occur several times
    rows: list[int | None]  # the guide's numbers; None: the answer has ended, and its distribution is not used
    baseline_BM: torch.Tensor  # V_m(s); nan where the answer has ended
    scored: list[dict[int, int]] = field(default_factory=list)  # token -> its index among the candidates
    values_BKM: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # V_m(s∘a); nan where not scored


class TiltProcessor(LogitsProcessor):
    """Turns next-token logits into log p + delta on the candidates, and -inf elsewhere.

    >>> processor = TiltProcessor(LocalGuide({"brief": value_model}), {"brief": 1.0}, eos_ids=base.eos_ids, pad_id=pad)
    >>> model.generate(**batch, logits_processor=[processor], min_new_tokens=1, do_sample=True, top_k=0, top_p=1.0)
    >>> processor.close()

    transformers runs its own processors (min_new_tokens, repetition_penalty) before this one, and temperature, top_k,
    top_p and min_p after it. So `temperature=T` samples softmax((log p + delta) / T), the engine's distribution,
    provided that temperature, top_k=0 and top_p=1.0 are given: otherwise a model's generation_config may truncate the
    tilted distribution. min_new_tokens=1, because the engine's answers have at least one token. num_beams ranks beams
    by the sum of log p + delta, which without a cap is log p(answer) + beta * V of its end, up to terms that all beams
    share.

    Rows are followed between calls. A row that grew by a scored token needs no new computation; a second beam from the
    same row shares its keys and values; everything else, such as a new batch, is encoded from the start.
    """

    def __init__(
        self,
        guide: Guide,
        weights: Mapping[str, float],
        beta: float = 8.0,
        tilt_cap: float | None = TILT_CAP,
        top_k: int = 40,
        *,
        eos_ids: Collection[int],
        pad_id: int | None = None,
    ):
        """
        Args:
            guide: not shared with an engine, because their row numbers would clash. A second LocalGuide of the same
                value models shares their weights.
            weights: objective -> weight, normalised to sum 1; all zero: the base model's own distribution.
            beta: nats of tilt per standard deviation of reward.
            tilt_cap: nats; None: unbounded.
            top_k: candidates, from the logits at temperature 1.
            eos_ids: the ids that end an answer, the same as for `generate`: their tilt has no cap.
            pad_id: the id that pads prompts on the left. Processors do not receive the attention mask, so all leading
                ones are taken as padding. None: no padding.

        Raises:
            RequestError: naming the argument, its value and the remedy.
        """
        for name, value, is_fine, remedy in (
            ("beta", beta, math.isfinite(beta) and beta >= 0, "use a number >= 0"),
            ("tilt_cap", tilt_cap, tilt_cap is None or tilt_cap > 0, "use a number > 0, or none"),
            ("top_k", top_k, top_k >= 1, "use an integer >= 1"),
        ):
            if not is_fine:
                raise RequestError(name, f"is {value!r}; {remedy}")
        self._guide, self._weights = guide, normalise_weights(weights, guide.objectives)
        self._used = [guide.objectives.index(name) for name in self._weights]
        self._beta, self._cap, self._top_k = beta, math.inf if tilt_cap is None else tilt_cap, top_k
        self._eos_ids, self._pad_id = frozenset(eos_ids), pad_id
        self._numbers = count()
        self._latest: _Batch | None = None

    def close(self) -> None:
        """Drop all rows and free their keys and values; the next call starts from scratch."""
        if self._latest is not None:
            self._guide.close([row for row in self._latest.rows if row is not None])
        self._latest = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits or log-probabilities [B, V] of the tokens that follow `input_ids` [B, T] -> log p + delta [B, V]."""
        one_B = scores.new_ones(len(scores))
        ids_BK, logprobs_BK = candidates(scores.float(), one_B.long() * self._top_k, one_B, 0 * one_B, one_B)
        if self._weights and self._beta > 0:
            self._latest = self._follow([tuple(ids) for ids in input_ids.tolist()])
            logprobs_BK = logprobs_BK + self._score(self._latest, ids_BK, logprobs_BK)
        return torch.full_like(scores, -math.inf).scatter(1, ids_BK, logprobs_BK.to(scores))

    def _score(self, batch: _Batch, ids_BK: torch.Tensor, logprobs_BK: torch.Tensor) -> torch.Tensor:
        """delta [B, K]; 0 where an answer has ended. Keeps the scored candidates for the next call."""
        (num_rows, num_candidates), device = ids_BK.shape, ids_BK.device
        is_running_B = torch.tensor([row is not None for row in batch.rows], device=device)
        is_scored_BK = logprobs_BK.isfinite() & is_running_B[:, None]
        rows, counts_B = [row for row in batch.rows if row is not None], is_scored_BK.sum(-1)
        batch.values_BKM = torch.full((num_rows, num_candidates, len(self._used)), math.nan, device=device)
        if rows:
            values_NM = self._guide.score(rows, counts_B[is_running_B].tolist(), ids_BK[is_scored_BK])
            batch.values_BKM[is_scored_BK] = values_NM[:, self._used].to(batch.values_BKM)
        # Missing candidates come after all others: indices among all are indices among the scored ones.
        batch.scored = [
            {token: index for index, token in enumerate(ids[:num_scored])}
            for ids, num_scored in zip(ids_BK.tolist(), counts_B.tolist(), strict=True)
        ]
        one_B = torch.ones(num_rows, device=device).double()
        delta_BK = tilt(
            batch.values_BKM,
            batch.baseline_BM.to(device),
            torch.tensor([list(self._weights.values())] * num_rows, device=device),
            self._beta * one_B,
            self._cap * one_B,
            torch.isin(ids_BK, torch.tensor(sorted(self._eos_ids), device=device)),
        )
        # The cap may hide an infinite V(s∘a).
        if not (delta_BK.isfinite() & batch.values_BKM.isfinite().all(-1))[is_scored_BK].all():
            self.close()
            raise ValueModelError("the value model returned a number that is not finite")
        return torch.where(is_scored_BK, delta_BK, 0.0)

    # --- the guide's rows -----------------------------------------------------------------------------------------

    def _follow(self, ids: Sequence[Ids]) -> _Batch:
        """Move the guide from the rows of the latest call to those of this one."""
        places: dict[Ids, list[int]] = {}
        for place, row_ids in enumerate(ids):
            places.setdefault(row_ids, []).append(place)
        unknown_BM = torch.full((len(ids), len(self._used)), math.nan, dtype=torch.float64)
        now = _Batch(places, [None] * len(ids), unknown_BM)
        parents = self._parents(ids)
        if parents is None:
            self.close()
            self._open(now, ids, {copies[0]: None for copies in places.values()})
            self._open(now, ids, {b: now.rows[copies[0]] for copies in places.values() for b in copies[1:]})
        else:
            assert self._latest is not None
            self._continue(self._latest, now, ids, parents)
        return now

    def _parents(self, ids: Sequence[Ids]) -> list[int] | None:
        """For every row its index in the latest call, one token ago; None if any row was not in it."""
        if self._latest is None:
            return None
        parents = []
        for place, row_ids in enumerate(ids):
            places = self._latest.places.get(row_ids[:-1])
            if places is None:
                return None
            parents.append(place if place in places else places[0])
        return parents

    def _continue(self, before: _Batch, now: _Batch, ids: Sequence[Ids], parents: Sequence[int]) -> None:
        """One continuation of every row keeps its number; the others share its keys and values."""
        kept: dict[int, tuple[int, int, int]] = {}  # row -> place before, place now, index of its new token
        sources: dict[int, int | None] = {}  # place now -> row
        for place, (parent, row_ids) in enumerate(zip(parents, ids, strict=True)):
            row, token = before.rows[parent], row_ids[-1]
            if token in self._eos_ids or (row is None and token == self._pad_id):
                continue
            if row is not None and token in before.scored[parent] and row not in kept:
                kept[row] = (parent, place, before.scored[parent][token])
                now.rows[place] = row
            else:
                sources[place] = row
        self._open(now, ids, sources)  # before their sources are extended or closed
        if kept:
            places_before, places, index = map(list, zip(*kept.values(), strict=True))
            now.baseline_BM[places] = before.values_BKM[places_before, index].to(now.baseline_BM)
            self._guide.keep(list(kept), torch.tensor(index))
        if dropped := [row for row in before.rows if row is not None and row not in kept]:
            self._guide.close(dropped)

    def _open(self, batch: _Batch, ids: Sequence[Ids], sources: Mapping[int, int | None]) -> None:
        """Open rows in the guide, by index; each shares all tokens except its last with its source."""
        opening = []
        for place, source in sources.items():
            tokens = self._without_padding(ids[place])
            batch.rows[place] = row = next(self._numbers)
            shared = 0 if source is None else len(tokens) - 1
            opening.append(GuideRow(row, tokens, frozenset(self._weights), source, shared))
        if opening:
            batch.baseline_BM[list(sources)] = self._guide.open(opening)[:, self._used].to(batch.baseline_BM)

    def _without_padding(self, ids: Ids) -> Ids:
        start = next((i for i, token in enumerate(ids) if token != self._pad_id), len(ids) - 1)
        return ids[start:]
