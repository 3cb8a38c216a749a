"""Answers of a mixture of policies, each with its exact divergence from the base model.

The base model and all policies step together, a batch of rows at a time. A merged policy is a mixture of one, so that
every method here is measured in the same way. Without divergences, a merged policy runs twice as fast in the engine.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.comparison.mixture import mix
from mavis_dist.core import noise
from mavis_dist.core.tilt import Filters, choose
from mavis_dist.decode import Choice, FinishReason, Request
from mavis_dist.decode.request import stream_of
from mavis_dist.decode.text import StoppedText
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel


@dataclass
class _Row:
    number: int  # index of the request
    request: Request
    choice: Choice

    @property
    def last_token(self) -> int:
        return self.choice.tokens[-1] if self.choice.tokens else self.request.prompt[-1]


class MixtureDecoder:
    """A base model with policies that share its tokenizer.

    >>> decoder = MixtureDecoder(base, [load_merged(config, store, {"rl-brief-kl0.1": 1.0})])
    >>> decoder.answer([Request("", base.chat("Why is the sky blue?"))])[0].divergence
    """

    def __init__(self, base: BaseModel, policies: Sequence[BaseModel], max_rows: int = 32):
        self._base, self._max_rows = base, max_rows
        self._models = [SlotModel(base_decoder(model.model)) for model in (base, *policies)]
        self._device = base.model.device
        self._eos = torch.tensor(sorted(base.eos_ids), device=self._device)

    @torch.inference_mode()
    def answer(
        self,
        requests: Sequence[Request],
        weights: Sequence[float] = (1.0,),
        strength: float = 1.0,
    ) -> list[Choice]:
        """One answer per request, in order, at temperature 1; prompt, params and stream of the requests are used.

        The noise is the engine's: with the same seed, strength 0 gives the tokens of the base model in the engine.

        Args:
            weights: of the policies; they sum to 1 in MOD.
        """
        waiting = [_Row(n, request, Choice(0)) for n, request in enumerate(requests)]
        waiting.reverse()
        choices, running = [row.choice for row in waiting[::-1]], list[_Row]()
        while waiting or running:
            room = self._max_rows - len(running)
            admitted = [waiting.pop() for _ in range(min(room, len(waiting)))]
            self._open(admitted, running)
            running += admitted
            self._step(running, weights, strength)
            for row in [row for row in running if row.choice.finish is not None]:
                self._close(row)
                running.remove(row)
        return choices

    def _open(self, rows: Sequence[_Row], running: Sequence[_Row]) -> None:
        """Encode the prompts of new rows but for their last token; equal ones once."""
        source_of = {row.request.prompt: row.number for row in running}
        copies, first = list[_Row](), list[_Row]()
        for row in rows:
            (copies if row.request.prompt in source_of else first).append(row)
            source_of.setdefault(row.request.prompt, row.number)
        for model in self._models:
            for row in first:
                model.open(row.number)
            missing = [row for row in first if len(row.request.prompt) > 1]
            if missing:
                tokens = [row.request.prompt[:-1] for row in missing]
                model.extend([row.number for row in missing], tokens, [0] * len(missing))
            for row in copies:
                prompt = row.request.prompt
                model.open(row.number, source_of[prompt], len(prompt) - 1)

    def _step(self, rows: Sequence[_Row], weights: Sequence[float], strength: float) -> None:
        """One more token of every row."""
        last_B = torch.tensor([row.last_token for row in rows], device=self._device)
        base_BV, *policies = (model.append([row.number for row in rows], last_B) for model in self._models)
        starting = torch.tensor([not row.choice.tokens for row in rows], device=self._device)
        base_BV[starting.nonzero(), self._eos] = float("-inf")  # an answer has at least one token
        mixture = mix(base_BV, policies, weights, strength, self._filters(rows))
        streams_B = torch.tensor([stream_of(row.request, 0) for row in rows], device=self._device)
        positions_B = torch.tensor([len(row.choice.tokens) for row in rows], device=self._device)
        ids_BK, logprobs_BK = mixture.ids_BK, mixture.logprobs_BK
        phi_BK = logprobs_BK + noise.gumbel(streams_B, positions_B, ids_BK)
        index_B1 = choose(phi_BK, torch.zeros_like(phi_BK), ids_BK)[:, None]
        logratios_B = (logprobs_BK - mixture.base_logprobs_BK).gather(1, index_B1)[:, 0]
        drawn = (ids_BK.gather(1, index_B1)[:, 0], logratios_B, mixture.divergence_B)
        for row, token, logratio, divergence in zip(rows, *(x.tolist() for x in drawn), strict=True):
            self._append(row, token, logratio, divergence)

    def _append(self, row: _Row, token: int, logratio: float, divergence: float) -> None:
        choice = row.choice
        choice.tokens.append(token)
        choice.logratios.append(logratio)
        choice.divergences.append(divergence)
        if token in self._base.eos_ids:
            choice.finish = FinishReason.STOP
        elif len(choice.tokens) == row.request.params.max_tokens:
            choice.finish = FinishReason.LENGTH
        if choice.finish is not None:
            choice.text = StoppedText(self._base.tokenizer).add(choice.tokens, last=True)

    def _close(self, row: _Row) -> None:
        for model in self._models:
            model.close(row.number)

    def _filters(self, rows: Sequence[_Row]) -> Filters:
        def column(name: str) -> list[float]:
            return [getattr(row.request.params, name) for row in rows]

        top_k = [row.request.params.top_k for row in rows]
        return Filters.of(top_k, column("top_p"), column("min_p"), [1.0] * len(rows), self._device)
