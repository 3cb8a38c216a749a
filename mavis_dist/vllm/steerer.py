"""Steers the rows of another engine's batch: its logits in, logits of the tilted distribution out.

The other engine, the host, computes the base model, schedules and samples; what it does with a row is known from the
row's tokens alone. So a row may wait, be moved, lose its keys and values, or have its token discarded: the guide's
caches follow from what the host has really appended. Knows nothing of vLLM.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import torch

from mavis_dist.core import noise
from mavis_dist.decode import Choice, Guide, GuideRow, Request, Scorer
from mavis_dist.decode.batch import Batch, Values, named
from mavis_dist.decode.draw import Drawn, DrawReplays, draw
from mavis_dist.decode.engine import VALUATIONS
from mavis_dist.decode.guide import Valuation
from mavis_dist.decode.scheduler import PromptVariant, Row
from mavis_dist.types import one_line

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Steered:
    """An answer of the host's that is steered."""

    request: Request  # valid, with its prompt
    generated: Sequence[int]  # the host's list of the answer's tokens, which grows; or a copy that is kept up to date
    is_drawn_here: bool = True  # False: the host samples from the tilted distribution
    error: str | None = None  # why it failed: from now on its only token is the one that marks failures
    row: Row | None = field(default=None, repr=False)  # None: the guide does not follow it
    scored: dict[int, tuple[int, Values]] = field(default_factory=dict, repr=False)
    """Of the last step: token -> its index among the candidates evaluated since the last token, and V after it."""
    num_scored: int = (
        0  # candidates that were evaluated since the last token, in several steps if tokens were discarded
    )
    unseen: list[int] = field(default_factory=list, repr=False)  # tokens that the guide has not received yet

    @property
    def has_turn(self) -> bool:
        """Whether its next token is tilted."""
        assert self.row is not None
        return self.row.position % self.request.guide_every == 0


class Steerer:
    """One for each batch of a host."""

    def __init__(
        self,
        guide: Guide,
        end_ids: Collection[int],
        default_end_id: int,
        vocabulary: int,
        failure_id: int | None = None,
    ):
        """
        Args:
            end_ids: all tokens that end an answer.
            default_end_id: the one of them that the host always takes for the end.
            failure_id: a token that hardly any answer contains, at which the host stops: it ends those that fail. None:
                the default end does.
        """
        self._guide, self._vocabulary = guide, vocabulary
        self._end_ids, self._default_end_id = frozenset(end_ids), default_end_id
        self._failure_id = failure_id
        self._numbers = count()
        self._batch: Batch | None = None
        self._batch_of: list[Steered] = []
        self._baseline_BM: torch.Tensor | None = None  # V before the last step, in the order of that batch
        self._eos: torch.Tensor | None = None
        self._replays: DrawReplays | None = None

    def close(self, answers: Iterable[Steered]) -> None:
        """Stop following answers that have left the host's batch; they may come back."""
        rows = [answer.row.number for answer in answers if answer.row is not None]
        for answer in answers:
            answer.row, answer.scored, answer.num_scored, answer.unseen = None, {}, 0, []
        if rows:
            self._guide.close(rows)

    @torch.inference_mode()
    def steer(self, answers: Sequence[Steered], logits_BV: torch.Tensor) -> None:
        """Replace the logits of the answers' next tokens, in place: by log p + delta on the candidates where the host
        samples, else by 0 for the token that is drawn; -inf everywhere else.

        An answer whose value models fail gets an `error`; the others do not notice.
        """
        sound = [b for b, answer in enumerate(answers) if answer.error is None and not self._has_ended(answer)]
        if len(sound) == len(answers):
            self._steer_sound(answers, logits_BV)
        elif sound:
            rows_BV = logits_BV[sound]
            self._steer_sound([answers[b] for b in sound], rows_BV)
            logits_BV[sound] = rows_BV
        for b, answer in enumerate(answers):
            if answer.error is not None:
                _leave_only(logits_BV[b], self._default_end_id if self._failure_id is None else self._failure_id)
            elif self._has_ended(answer):
                _leave_only(logits_BV[b], self._default_end_id)

    def _has_ended(self, answer: Steered) -> bool:
        """Whether an answer ended with a token that the host does not take for an end."""
        return bool(answer.generated) and answer.generated[-1] in self._end_ids

    def _steer_sound(self, answers: Sequence[Steered], logits_BV: torch.Tensor) -> None:
        try:
            self._steer_together(answers, logits_BV)
            return
        except Exception as error:  # whatever a model, or the memory of a device, does
            self._forget(answers)
            if len(answers) == 1:
                answers[0].error = one_line(f"{type(error).__name__}: {error}")
                logger.exception("an answer fails, because its value models failed")
                return
        # Not to fail all of them for one, they are tried one by one; the logits are as they were, but for ends that no
        # answer begins with.
        for b, answer in enumerate(answers):
            self._steer_sound([answer], logits_BV[b : b + 1])

    def _steer_together(self, answers: Sequence[Steered], logits_BV: torch.Tensor) -> None:
        batch = self._follow(answers, logits_BV.device)
        assert self._replays is not None
        guided, self._baseline_BM = batch.guided(), batch.baseline_BM
        drawn = draw(batch, guided, logits_BV, self._guide, self._replays)
        self._record(answers, guided, drawn)
        _write(answers, drawn, logits_BV)

    # --- the guide's rows follow the host's -----------------------------------------------------------------------

    def _follow(self, answers: Sequence[Steered], device: torch.device) -> Batch:
        """Move the guide to what the host has appended since the last step; the answers as a batch."""
        known: dict[int, Values] = {}
        is_regular = answers == self._batch_of  # the same answers, and each of them one token longer
        kept: list[tuple[int, int]] = []
        opening: list[Steered] = []
        for answer in answers:
            if answer.row is None or not _goes_on(answer.row, answer.generated):
                opening.append(answer)
                continue
            new, number = list(answer.generated[answer.row.position :]), answer.row.number
            is_regular = is_regular and len(new) == 1
            if not new:  # the host discarded the token, as behind a part of a prompt
                if answer in self._batch_of:
                    known |= self._baseline_before(answer)
                else:
                    opening.append(answer)
                continue
            if new[0] in answer.scored:
                index, known[number] = answer.scored[new[0]]
                kept.append((number, index))
                new_unseen = new[1:]
            else:
                new_unseen = new
            answer.unseen += new_unseen
            answer.num_scored = 0
            for token in new:
                answer.row.append(token)
        if kept:
            index_B = torch.tensor([index for _, index in kept], device=device)
            self._guide.keep([number for number, _ in kept], index_B)
        known |= self._open(opening)
        known |= self._extend([answer for answer in answers if answer.unseen and answer.has_turn])
        return self._assemble(answers, known, is_regular and not opening, device)

    def _baseline_before(self, answer: Steered) -> dict[int, Values]:
        """V before the last step, by row number."""
        assert self._batch is not None
        assert self._baseline_BM is not None
        assert answer.row is not None
        b = self._batch_of.index(answer)
        return dict(zip([answer.row.number], named(self._batch.objectives, self._baseline_BM[b : b + 1]), strict=True))

    def _open(self, answers: Sequence[Steered]) -> dict[int, Values]:
        """Let the guide follow answers from now on, or again; V after their last tokens by row number."""
        if not answers:
            return {}
        self.close(answers)
        # Answers to one prompt share its keys and values: the others are opened when the first has them.
        first = {_shared(answer.request): answer for answer in self._batch_of if answer.row is not None}
        rows, rows_later = [], []
        for answer in answers:
            source = first.setdefault(_shared(answer.request), answer)
            if source is answer:
                rows.append(self._guide_row(answer))
            else:
                rows_later.append(self._guide_row(answer, source))
        known: dict[int, Values] = {}
        for opened in filter(None, (rows, rows_later)):
            values = named(self._guide.objectives, self._guide.open(opened))
            known |= zip([row.row for row in opened], values, strict=True)
        return known

    def _guide_row(self, answer: Steered, source: Steered | None = None) -> GuideRow:
        request, number = answer.request, next(self._numbers)
        tokens = [*request.prompt, *answer.generated]
        variant = PromptVariant(number, len(request.prompt), tokens, 0, len(tokens) - 1)
        answer.row = Row(request, Choice(0), _stream(request), [variant])
        _, used, valuation = _shared(request)
        if source is None or source.row is None:
            return GuideRow(number, tuple(tokens), used, valuation=valuation)
        return GuideRow(number, tuple(tokens), used, source.row.number, len(request.prompt) - 1, valuation)

    def _extend(self, answers: Sequence[Steered]) -> dict[int, Values]:
        """Send the guide the tokens that it has not received; V after the last of them by row number."""
        if not answers:
            return {}
        rows = [answer.row.number for answer in answers if answer.row is not None]
        values_BM = self._guide.extend(rows, [answer.unseen for answer in answers])
        for answer in answers:
            answer.unseen = []
        return dict(zip(rows, named(self._guide.objectives, values_BM), strict=True))

    def _assemble(
        self, answers: Sequence[Steered], known: dict[int, Values], is_regular: bool, device: torch.device
    ) -> Batch:
        """The answers as tensors, made anew unless each of them has one more token."""
        rows = [answer.row for answer in answers if answer.row is not None]
        if self._eos is None:
            self._eos = torch.tensor(sorted(self._end_ids), device=device)
            self._replays = DrawReplays.on(device)
        if is_regular and self._batch is not None:
            self._batch.advance(torch.tensor([row.tokens[-1] for row in rows], device=device))
            objectives = self._batch.objectives
            changed = [b for b, row in enumerate(rows) if row.number in known]
            if changed:
                values = [[known[rows[b].number].get(name, math.nan) for name in objectives] for b in changed]
                baseline_BM = self._batch.baseline_BM.clone()
                baseline_BM[changed] = torch.tensor(values, device=device).to(baseline_BM)
                self._batch.baseline_BM = baseline_BM
        else:
            before = self._batch.baselines() if self._batch is not None else {}
            self._batch = Batch(rows, self._guide.objectives, before | known, self._eos, self._vocabulary)
        self._batch_of = list(answers)
        return self._batch

    def _record(self, answers: Sequence[Steered], guided: Sequence[int], drawn: Drawn) -> None:
        """Which of the evaluated candidates the host may append next."""
        is_guided = set(guided)
        values_BKM, ids_BK = drawn.scores.values_BKM, drawn.drafts.ids_BK
        for b, answer in enumerate(answers):
            answer.scored, offset = {}, answer.num_scored
            if b in drawn.faults:
                answer.error = drawn.faults[b]
                logger.error("an answer fails: %s", drawn.faults[b])
            elif b not in is_guided or answer.request.scorer is Scorer.QHEAD:
                continue  # a student predicts without a pass over the token, so it has not seen the token
            elif answer.is_drawn_here:
                values = {name: column[b] for name, column in drawn.values.items()}
                answer.scored[drawn.tokens[b]] = offset + int(drawn.index_B[b]), values
            else:
                num_scored = drawn.num_candidates[b]
                for index, (token, values_M) in enumerate(
                    zip(ids_BK[b, :num_scored].tolist(), values_BKM[b, :num_scored].tolist(), strict=True)
                ):
                    answer.scored[token] = offset + index, dict(zip(drawn.values, values_M, strict=True))
            answer.num_scored = offset + drawn.num_candidates[b]

    def _forget(self, answers: Sequence[Steered]) -> None:
        """Start again after a failure, whose effect on the guide is not known."""
        for answer in {*answers, *self._batch_of}:
            with suppress(Exception):
                self.close([answer])
            answer.row = None
        self._batch, self._batch_of = None, []


def _goes_on(row: Row, generated: Sequence[int]) -> bool:
    """Whether the host has taken back none of the tokens that a row has."""
    position = row.position
    return len(generated) >= position and (position == 0 or generated[position - 1] == row.tokens[-1])


def _shared(request: Request) -> tuple[tuple[int, ...], frozenset[str], Valuation]:
    """What two requests must have in common to share the keys and values of a prompt."""
    return request.prompt, frozenset(request.weights), VALUATIONS.get(request.scorer, Valuation.EVALUATED)


def _stream(request: Request) -> int:
    assert request.params.seed is not None
    return noise.stream(request.params.seed, 0)


def _write(answers: Sequence[Steered], drawn: Drawn, logits_BV: torch.Tensor) -> None:
    logits_BV.fill_(-math.inf)
    logits_BV.scatter_(1, drawn.tokens_B[:, None], 0.0)
    for b, answer in enumerate(answers):
        if not answer.is_drawn_here:
            tilted_K = drawn.drafts.logprobs_BK[b] + drawn.scores.delta_BK[b]
            logits_BV[b].scatter_(0, drawn.drafts.ids_BK[b], tilted_K.to(logits_BV.dtype))


def _leave_only(logits_V: torch.Tensor, token: int) -> None:
    logits_V.fill_(-math.inf)
    logits_V[token] = 0.0
