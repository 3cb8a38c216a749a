"""The decode loop: decide, compute, absorb. The only one in the project.

Every step admits waiting answers, computes the base model's logits for all running answers at once, asks the guide
what the candidates are worth, draws one token each, and hands out what was written. Answers of different prompts,
lengths and weights share the batch; none depends on its neighbours.

Shapes: B rows, G guided rows, V vocabulary, K candidates, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, evaluation_order
from mavis_dist.decode.guide import Guide, GuideRow
from mavis_dist.decode.request import Choice, FinishReason, Request, Scorer, Update, prepare
from mavis_dist.decode.scheduler import Row, Scheduler
from mavis_dist.decode.scorer import Drafts, Guided, score
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel


@dataclass(frozen=True)
class _Drawn:
    """One token for every row; lists hold one entry per row."""

    index_B: torch.Tensor  # of the token among its candidates
    tokens: list[int]
    logratios: list[float]
    divergences: list[float]
    values_BM: torch.Tensor  # V_m(s∘a) of the token, nan where not asked for
    num_candidates: list[int]
    is_sound: list[bool]  # every value asked for was finite


class Engine:
    """Writes answers with a base model, tilted by a guide.

    >>> engine = Engine(load_base("smollm2-135m-instruct"), LocalGuide({"brief": value_model}))
    >>> [choice] = engine.generate([Request("1", prompt_ids, weights={"brief": 1.0})])
    """

    def __init__(self, base: BaseModel, guide: Guide | None = None, max_rows: int = 32):
        self.max_context = base.max_context
        self._guide = guide
        self._scheduler = Scheduler(max_rows)
        model: Any = base.model
        self._base = SlotModel(lambda **inputs: model(**inputs, logits_to_keep=1).logits, model.base_model)
        self._device = model.device
        self._eos = torch.tensor(sorted(base.eos_ids), device=self._device)
        self._eos_ids = frozenset(base.eos_ids)
        self._baseline: dict[int, torch.Tensor] = {}  # row number -> V_m(s) of its last token [M]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._guide.objectives if self._guide else ()

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    @property
    def load(self) -> tuple[int, int]:
        """Answers being written and answers waiting."""
        return len(self._scheduler.running), self._scheduler.num_waiting

    def submit(self, request: Request, first: bool = False) -> Request:
        """Queue a request (`first`: before all others); returns it with its seed and normalised weights.

        Raises:
            RequestError: naming the field, its value and the remedy.
        """
        request = prepare(request, self.objectives, self.max_context)
        self._scheduler.submit(request, first)
        return request

    def cancel(self, request_id: str) -> list[Update]:
        """Stop a request's answers, running or waiting."""
        updates = []
        for row in self._scheduler.cancel(request_id):
            row.choice.finish = FinishReason.ABORT
            updates.append(_update(row, ()))
        if self.is_idle:
            self._release()
        return updates

    def generate(self, requests: Sequence[Request]) -> list[list[Choice]]:
        """All answers to all requests, in the order of the requests; needs an idle engine."""
        assert self.is_idle, "generate() needs an engine without other requests; use submit() and step()"
        place = {request.id: i for i, request in enumerate(requests)}
        if len(place) < len(requests):
            raise ValueError("two requests have the same id: give every request an id of its own")
        for request in requests:
            self.submit(request)
        answers: list[list[Choice]] = [[] for _ in requests]
        while not self.is_idle:
            for update in self.step():
                if update.finished is not None:
                    answers[place[update.request_id]].append(update.finished)
        return [sorted(choices, key=lambda choice: choice.index) for choices in answers]

    def stream(self, request: Request) -> Iterator[Update]:
        """The answer token by token; other requests go on meanwhile, but their updates are dropped."""
        request = self.submit(request)
        try:
            while self._scheduler.has(request.id):
                yield from (update for update in self.step() if update.request_id == request.id)
        finally:
            self.cancel(request.id)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Write one more token of every running answer."""
        self._admit()
        rows = self._scheduler.running
        if not rows:
            return []
        logits_BV = self._base.extend([row.number for row in rows], [row.tokens[-1:] for row in rows])
        assert logits_BV is not None
        updates = self._absorb(rows, self._draw(rows, logits_BV.float()))
        if self.is_idle:
            self._release()
        return updates

    def _admit(self) -> None:
        """Open admitted rows up to their last token, whose logits the step computes."""
        admissions = self._scheduler.admit()
        missing: dict[int, list[int]] = {}
        guided: list[GuideRow] = []
        for admission in admissions:
            row, source = admission.row, admission.source.number if admission.source else None
            present = self._base.open(row.number, source, min(admission.shared, len(row.tokens) - 1))
            if present < len(row.tokens) - 1:
                missing[row.number] = row.tokens[present:-1]
            if row.request.is_guided:
                used = frozenset(row.request.weights)
                guided.append(GuideRow(row.number, tuple(row.tokens), used, source, admission.shared))
        if missing:
            self._base.extend(list(missing), list(missing.values()), outputs=False)
        if guided:
            assert self._guide is not None
            values_GM = self._guide.open(guided)
            self._baseline.update(zip((row.row for row in guided), values_GM, strict=True))
        self._release()

    def _release(self) -> None:
        """Free the rows that finished; nobody shares their first tokens any more."""
        released = [row.number for row in self._scheduler.release()]
        for number in released:
            if number in self._base:
                self._base.close(number)
        guided_numbers = [number for number in released if self._baseline.pop(number, None) is not None]
        if guided_numbers:
            assert self._guide is not None
            self._guide.close(guided_numbers)

    def _draw(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> _Drawn:
        """One token for every row. Candidates are put in evaluation order first; indices refer to that order."""
        drafts = self._drafts(rows, logits_BV)
        scores = score(drafts, self._guided(rows), self._guide, len(self._eos))
        index_B = choose(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
        every_B = torch.arange(len(rows), device=self._device)
        divisor_B = torch.where(drafts.temperature_B > 0, drafts.temperature_B, float("inf"))
        return _Drawn(
            index_B=index_B,
            tokens=drafts.ids_BK[every_B, index_B].tolist(),
            logratios=(scores.delta_BK[every_B, index_B] / divisor_B - scores.log_partition_B).tolist(),
            divergences=scores.divergence_B.tolist(),
            values_BM=scores.values_BKM[every_B, index_B].cpu(),
            num_candidates=scores.num_evaluated_B.tolist(),
            is_sound=scores.is_sound_B.tolist(),
        )

    def _drafts(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> Drafts:
        """The candidate sets of all rows with their noise."""
        params = [row.request.params for row in rows]
        temperature_B = self._per_row([p.temperature for p in params])
        is_first_B = torch.tensor([row.position == 0 for row in rows], device=self._device)
        logits_BV[is_first_B.nonzero(), self._eos] = float("-inf")  # an answer has at least one token
        ids_BK, logprobs_BK = candidates(
            logits_BV,
            torch.tensor([p.top_k for p in params], device=self._device),
            self._per_row([p.top_p for p in params]),
            self._per_row([p.min_p for p in params]),
            temperature_B,
        )
        noise_BK = noise.gumbel(
            torch.tensor([row.stream for row in rows], device=self._device),
            torch.tensor([row.position for row in rows], device=self._device),
            ids_BK,
        )
        phi_BK = logprobs_BK + temperature_B[:, None] * noise_BK
        is_eos_BK = torch.isin(ids_BK, self._eos)
        order_BK = evaluation_order(logprobs_BK, phi_BK, is_eos_BK)
        ids_BK, logprobs_BK, phi_BK, is_eos_BK = (
            x.gather(-1, order_BK) for x in (ids_BK, logprobs_BK, phi_BK, is_eos_BK)
        )
        return Drafts(ids_BK, logprobs_BK, phi_BK, is_eos_BK, temperature_B)

    def _guided(self, rows: Sequence[Row]) -> Guided:
        """What steers the guided ones among the rows."""
        places = [b for b, row in enumerate(rows) if row.number in self._baseline]
        requests = [rows[b].request for b in places]
        weights = [[r.weights.get(m, 0.0) for m in self.objectives] for r in requests]
        num_objectives = len(self.objectives)
        baseline = [self._baseline[rows[b].number] for b in places]
        return Guided(
            places=places,
            numbers=[rows[b].number for b in places],
            is_lazy=[r.scorer is Scorer.LAZY for r in requests],
            weights_GM=torch.tensor(weights, device=self._device).reshape(len(places), num_objectives),
            baseline_GM=torch.stack(baseline).to(self._device) if baseline else torch.zeros(0, num_objectives),
            beta_G=self._per_row([r.beta for r in requests]),
            cap_G=self._per_row([float("inf") if r.tilt_cap is None else r.tilt_cap for r in requests]),
        )

    def _absorb(self, rows: Sequence[Row], drawn: _Drawn) -> list[Update]:
        """Append the chosen tokens, finish what is finished, and tell the guide about the rest."""
        updates, finished, kept = [], [], []
        for b, row in enumerate(rows):
            choice, guided = row.choice, row.number in self._baseline
            if guided and not drawn.is_sound[b]:
                choice.finish, choice.error = FinishReason.ERROR, "a value model returned a value that is not finite"
                finished.append(row)
                updates.append(_update(row, ()))
                continue
            start, token = row.position, drawn.tokens[b]
            row.tokens.append(token)
            choice.tokens.append(token)
            choice.logratios.append(drawn.logratios[b])
            choice.divergence += drawn.divergences[b]
            if guided:
                choice.num_scored += drawn.num_candidates[b] * len(row.request.weights)
                values = dict(zip(self.objectives, drawn.values_BM[b].tolist(), strict=True))
                choice.values = {name: values[name] for name in row.request.weights}
                self._baseline[row.number] = drawn.values_BM[b]
            if token in self._eos_ids:
                choice.finish = FinishReason.STOP
            elif row.position == row.request.params.max_tokens:
                choice.finish = FinishReason.LENGTH
            if choice.finish is not None:
                finished.append(row)
            elif guided:
                kept.append(b)
            updates.append(_update(row, (token,), start))
        if kept:
            assert self._guide is not None
            self._guide.keep([rows[b].number for b in kept], drawn.index_B[kept])
        self._scheduler.finish(finished)
        return updates

    def _per_row(self, numbers: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.float64, device=self._device)


def _update(row: Row, tokens: tuple[int, ...], start: int | None = None) -> Update:
    finished = row.choice if row.choice.finish is not None else None
    return Update(row.request.id, row.choice.index, row.position if start is None else start, tokens, finished)
