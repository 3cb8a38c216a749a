"""The decode loop: decide, compute, absorb. The only one in the project.

Every step admits waiting answers, encodes some of their tokens, computes the base model's logits for all running
answers at once, scores the candidates with the guide, draws one token each, and returns the new tokens. Answers of
different prompts, lengths and weights share the batch; none depends on its neighbours.

Shapes: B rows, V vocabulary, K candidates, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from mavis_dist.decode.batch import Batch, Values, named
from mavis_dist.decode.draw import Drawn, DrawReplays, draw
from mavis_dist.decode.guide import Guide, GuideRow, Valuation
from mavis_dist.decode.preference_step import PreferenceStep
from mavis_dist.decode.request import Choice, FinishReason, Request, RequestError, Scorer, Update
from mavis_dist.decode.scheduler import Piece, Row, Scheduler
from mavis_dist.decode.text import StoppedText
from mavis_dist.decode.validate import Bounds, validate
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel
from mavis_dist.models.rows import Rows

# Tokens of new prompts that a step encodes: few enough not to delay running answers noticeably.
PREFILL_TOKENS = {"cpu": 128, "cuda": 2048}
VALUATIONS = {Scorer.QHEAD: Valuation.PREDICTED, Scorer.PREDICTED: Valuation.CHECKED}  # EVALUATED by the others


class Engine:
    """Generates answers with a base model, tilted by a guide: up to `max_rows` rows (vLLM: max_num_seqs) at a time.

    >>> base = load_base("smollm2-135m-instruct")
    >>> engine = Engine(base, LocalGuide({"brief": value_model}))
    >>> [[choice]] = engine.generate([Request("1", base.chat("Why is the sky blue?"), weights={"brief": 1.0})])
    >>> choice.text, choice.divergence, choice.values["brief"][-1]
    """

    def __init__(
        self,
        base: BaseModel,
        guide: Guide | None = None,
        max_rows: int = 32,
        cache_tokens: int | None = None,
        prefill_tokens: int | None = None,
        use_hf_forward: bool = False,
        static_shapes: bool | None = None,
    ):
        """
        Args:
            max_rows: rows of the base model at a time: one per answer, and one more for each of its preferences.
                Further answers wait.
            cache_tokens: limit on the base model's keys and values, in tokens: the number of rows at a time times the
                longest prompt and answer among them. None: bounded only by `max_rows` and the model's context.
            prefill_tokens: tokens of new prompts encoded per step, so that long prompts do not delay running answers.
                None: 128 on a CPU, 2048 on a GPU.
            use_hf_forward: run the base model through its own forward pass, even where there is a faster one.
            static_shapes: the shapes of a step depend on buckets only, and it waits for the device once. None: on all
                devices but CPUs, where exact shapes are faster.
        """
        self.max_context, self.max_rows, self.cache_tokens = base.max_context, max_rows, cache_tokens
        self._guide = guide
        self._scheduler = Scheduler(max_rows, cache_tokens)
        if base.rows is None:
            is_static = base.model.device.type != "cpu" if static_shapes is None else static_shapes
            self._base: Rows = SlotModel(base_decoder(base.model, use_hf_forward), is_static)
        else:
            is_static, self._base = False, base.rows()
        self._static_shapes, self._device = is_static, self._base.device
        # A LocalGuide, or one around it: no other has students.
        self._states_guide: Any = guide if hasattr(guide, "accept_states") else None
        if self._states_guide is not None:
            self._states_guide.accept_states(self._base.read_states)
        self.tokenizer, self.eos_ids = base.tokenizer, frozenset(base.eos_ids)
        self._vocabulary = base.model.config.get_text_config().vocab_size
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(self._device.type, 2048)
        self._eos = torch.tensor(sorted(base.eos_ids), device=self._device)
        self._replays = DrawReplays.on(self._device)
        self._batch: Batch | None = None
        self._opened: dict[int, Values] = {}  # V_m(s) of rows that are not in a batch yet, by row number
        self._unseen: dict[int, list[int]] = {}  # tokens that the guide has not received yet, by row number

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._guide.objectives if self._guide else ()

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    @property
    def load(self) -> tuple[int, int]:
        """Rows in use and rows waiting."""
        return self._scheduler.num_admitted, self._scheduler.num_waiting

    @property
    def is_batch_invariant(self) -> bool:
        """Whether no row's logits depend on the other rows, to the last bit."""
        return self._base.is_batch_invariant

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values the base model holds."""
        return self._base.num_tokens

    def validate(self, request: Request) -> Request:
        """The request with a seed and normalised weights; validating it again changes nothing. Thread-safe.

        Raises:
            RequestError: naming the field, its value and the remedy.
        """
        bounds = Bounds(
            self.objectives,
            self.max_context,
            self._guide.predicted if self._guide else (),
            self._vocabulary,
            self.cache_tokens,
            self._scheduler.max_rows,
        )
        if request.preferences and not self._base.reads_answers:
            raise RequestError("preferences", "this engine's base model cannot read them: use base.engine=builtin")
        return validate(request, bounds)

    def submit(self, request: Request, first: bool = False) -> Request:
        """Validate and queue a request (`first`: before all others); returns it validated. Raises RequestError."""
        request = self.validate(request)
        self.enqueue(request, first)
        return request

    def enqueue(self, request: Request, first: bool = False) -> None:
        """Queue a request that `validate` has returned."""
        self._scheduler.submit(request, first)

    def cancel(self, request_id: str) -> list[Update]:
        """Stop a request's answers, running or waiting."""
        updates = []
        for row in self._scheduler.cancel(request_id):
            self._finish(row, FinishReason.ABORT)
            updates.append(_update(row))
        if self.is_idle:
            self._release()
        return updates

    def generate(self, requests: Sequence[Request]) -> list[list[Choice]]:
        """All answers to all requests, in the order of the requests; needs an idle engine."""
        assert self.is_idle, "generate() needs an engine without other requests; use submit() and step()"
        place = {request.id: i for i, request in enumerate(requests)}
        if len(place) < len(requests):
            raise ValueError("two requests have the same id: give every request its own id")
        for request in [self.validate(request) for request in requests]:  # all are validated before any starts
            self.enqueue(request)
        answers: list[list[Choice]] = [[] for _ in requests]
        while not self.is_idle:
            for update in self.step():
                if update.finished is not None:
                    answers[place[update.request_id]].append(update.finished)
        return [sorted(choices, key=lambda choice: choice.index) for choices in answers]

    def stream(self, request: Request) -> Iterator[Update]:
        """The answer in pieces, as tokens and text; other requests continue meanwhile, their updates are dropped."""
        request = self.submit(request)
        texts = [self._text_of(request) for _ in range(request.params.n)]
        try:
            while self._scheduler.has(request.id):
                for update in self.step():
                    if update.request_id == request.id:
                        text = texts[update.index].add(update.tokens, last=update.finished is not None)
                        yield replace(update, text=text)
        finally:
            self.cancel(request.id)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Generate one more token of every running answer."""
        self._encode()
        if not self._scheduler.running:
            return []
        batch = self._assemble()
        logits_RV = self._base.append(batch.variants, batch.last_R)
        guided = batch.guided()
        self._catch_up(batch, guided)
        self._observe(batch, guided)
        if batch.has_preferences:
            preference_step = PreferenceStep(batch.rows, logits_RV)
            drawn = draw(batch, guided, preference_step.logits_BV, self._guide, self._replays, preference_step)
            preference_step.record(drawn.tokens, drawn.preference_divergences, drawn.faults)
        else:
            drawn = draw(batch, guided, logits_RV, self._guide, self._replays)
        batch.advance(drawn.tokens_B)
        updates = self._absorb(batch, guided, drawn)
        # Draws will be continued: their keys and values stay for the next requests.
        if self.is_idle and all(row.request.draws is None for row in batch.rows):
            self._release()
        return updates

    # --- decide: which rows are in the batch ----------------------------------------------------------------------

    def _encode(self) -> None:
        """Admit rows and encode a limited number of their tokens, in the base model's and the guide's caches alike."""
        self._scheduler.admit()
        budget = self._prefill_tokens
        while budget > 0 and (pieces := self._scheduler.pieces(budget)):
            self._encode_base(pieces)
            plain = [piece for piece in pieces if piece.variant is piece.row.variants[0]]
            self._encode_guide([piece for piece in plain if piece.row.request.is_guided])
            self._scheduler.encoded(pieces)
            budget -= sum(piece.end - piece.start for piece in pieces)
        self._release()

    def _encode_base(self, pieces: Sequence[Piece]) -> None:
        if any(piece.is_first for piece in pieces):
            self._base.reserve(self._scheduler.num_admitted, max(piece.row.reserved for piece in pieces))
        for piece in pieces:
            if piece.is_first:
                self._base.open(piece.variant.number, piece.source.number if piece.source else None, piece.start)
        new = [piece for piece in pieces if piece.end > piece.start]
        if new:
            tokens = [piece.variant.tokens[piece.start : piece.end] for piece in new]
            rewarded = [piece.rewarded for piece in new]
            logits_RV = self._base.extend([piece.variant.number for piece in new], tokens, [len(r) for r in rewarded])
            logits = logits_RV.split([len(r) for r in rewarded])
            for piece, following, logits_TV in zip(new, rewarded, logits, strict=True):
                if following:
                    chosen = torch.tensor(following, device=self._device)[:, None]
                    logprobs_T = logits_TV.gather(1, chosen)[:, 0].float() - logits_TV.float().logsumexp(-1)
                    piece.variant.logprobs += logprobs_T.tolist()

    def _encode_guide(self, pieces: Sequence[Piece]) -> None:
        """The last piece includes the last token: V(s) is its value."""
        opening, rows, tokens = [], [], []
        for piece in pieces:
            row, end = piece.row, piece.end + piece.is_last
            if piece.is_first:
                source, used = piece.source.number if piece.source else None, frozenset(row.request.weights)
                valuation = VALUATIONS.get(row.request.scorer, Valuation.EVALUATED)
                opening.append(GuideRow(row.number, tuple(row.tokens[:end]), used, source, piece.start, valuation))
            else:
                rows.append(row.number)
                tokens.append(row.tokens[piece.start : end])
        if self._guide and opening:
            values = named(self.objectives, self._guide.open(opening))
            self._opened.update(zip([row.row for row in opening], values, strict=True))
        if self._guide and rows:
            values = named(self.objectives, self._guide.extend(rows, tokens))
            self._opened.update(zip(rows, values, strict=True))

    def _assemble(self) -> Batch:
        """The running rows as tensors, rebuilt when a row or an objective was added or removed."""
        rows = self._scheduler.running
        if self._batch is None or self._batch.rows != rows or self._batch.objectives != self.objectives:
            known = self._opened | (self._batch.baselines() if self._batch else {})
            static_calls = self._static_shapes and self._guide is not None and self._guide.static_shapes
            self._batch = Batch(
                rows, self.objectives, known, self._eos, self._vocabulary, self._static_shapes, static_calls
            )
            running = set(self._batch.numbers)
            self._opened = {number: values for number, values in self._opened.items() if number not in running}
        return self._batch

    def _release(self) -> None:
        """Free the finished rows; no other row can share their first tokens any more."""
        released = self._scheduler.release()
        for row in released:
            for variant in row.variants:
                if variant.number in self._base:
                    self._base.close(variant.number)
            self._opened.pop(row.number, None)
            self._unseen.pop(row.number, None)
        # A step that failed may have opened a row without recording it.
        guided = [row.number for row in released if row.request.is_guided]
        if self._guide and guided:
            self._guide.close(guided)
        if self.is_idle:
            self._batch = None

    # --- compute: one token for every row -------------------------------------------------------------------------

    def _catch_up(self, batch: Batch, guided: Sequence[int]) -> None:
        """Send the guide the tokens that were generated without it, for the rows that it scores next."""
        behind = [b for b in guided if batch.numbers[b] in self._unseen] if self._unseen else []
        if behind:
            assert self._guide is not None
            numbers = [batch.numbers[b] for b in behind]
            values_BM = self._guide.extend(numbers, [self._unseen.pop(number) for number in numbers])
            batch.baseline_BM[behind] = values_BM.to(batch.baseline_BM)

    def _observe(self, batch: Batch, guided: Sequence[int]) -> None:
        """Give students the states of this step that they read: V(s) follows from them."""
        guide, states_RH = self._states_guide, self._base.states
        if guide is None or states_RH is None or not guide.reads_states:
            return
        predicted = [b for b in guided if batch.rows[b].request.scorer is Scorer.QHEAD]
        if predicted:
            # The plain variants of all rows come first.
            values_BM = guide.observe([batch.numbers[b] for b in predicted], states_RH[predicted])
            values_BM = values_BM.to(batch.baseline_BM)
            batch.baseline_BM[predicted] = torch.where(values_BM.isnan(), batch.baseline_BM[predicted], values_BM)

    # --- absorb: the new tokens -----------------------------------------------------------------------------------

    def _absorb(self, batch: Batch, guided: Sequence[int], drawn: Drawn) -> list[Update]:
        """Append the chosen tokens, end the finished rows, and let the guide follow the others."""
        updates, kept, finished, is_guided = [], [], [], set(guided)
        for b, row in enumerate(batch.rows):
            if b in drawn.faults:
                row.choice.error = f"request {row.request.id!r}: {drawn.faults[b]}"
                self._finish(row, FinishReason.ERROR)
                updates.append(_update(row))
                finished.append(row)
                continue
            start = row.position
            self._append(row, start, b, drawn)
            updates.append(_update(row, start, (drawn.tokens[b],)))
            if row.choice.finish is not None:
                finished.append(row)
            # A student predicts without a forward pass over the token, so it has not seen the token yet.
            elif b in is_guided and row.request.scorer is not Scorer.QHEAD:
                kept.append(b)
            elif batch.is_guided[b]:
                self._unseen.setdefault(row.number, []).append(drawn.tokens[b])
        if kept:
            assert self._guide is not None
            self._guide.keep(*batch.followed(kept, drawn.index_B))
        if finished:
            self._scheduler.finish(finished)
        return updates

    def _append(self, row: Row, position: int, b: int, drawn: Drawn) -> None:
        choice, token = row.choice, drawn.tokens[b]
        row.append(token)
        choice.tokens.append(token)
        if b in drawn.alternatives:
            choice.alternatives = drawn.alternatives[b]
        if b in drawn.logprobs:
            choice.logprobs.append(drawn.logprobs[b])
        choice.logratios.append(drawn.logratios[b])
        choice.divergences.append(drawn.divergences[b])
        if row.request.is_guided:
            choice.num_scored.append(drawn.num_candidates[b])
            for name in row.request.weights:
                choice.values.setdefault(name, []).append(drawn.values[name][b])
        if token in self.eos_ids or self._is_stopped(row, token):
            self._finish(row, FinishReason.STOP)
        elif position + 1 == row.request.params.max_tokens:
            self._finish(row, FinishReason.LENGTH)

    def _is_stopped(self, row: Row, token: int) -> bool:
        if not row.request.params.stop:
            return False
        if row.text is None:
            row.text = self._text_of(row.request)
        row.text.add((token,))
        return row.text.is_stopped

    def _finish(self, row: Row, reason: FinishReason) -> None:
        row.choice.finish = reason
        text = self._text_of(replace(row.request, answer=()))
        row.choice.text = text.add(row.tokens[len(row.request.prompt) :], last=True)

    def _text_of(self, request: Request) -> StoppedText:
        """The text of an answer, starting with the tokens that it continues."""
        text = StoppedText(self.tokenizer, request.params.stop, request.text_before)
        text.add(request.answer)
        return text


def _update(row: Row, start: int | None = None, tokens: tuple[int, ...] = ()) -> Update:
    finished = row.choice if row.choice.finish is not None else None
    start = row.position if start is None else start
    logprobs = tuple(row.choice.logprobs[-len(tokens) :]) if tokens else ()
    return Update(row.request.id, row.choice.index, start, tokens, finished, logprobs)
