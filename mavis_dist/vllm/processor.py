"""The logits processor that vLLM loads, for both of its model runners.

vLLM makes one in each worker process. The workers of a tensor-parallel group all sample for themselves: the first alone
has value models, and sends the steered rows to the others, so that all of them append the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import vllm
from vllm.distributed import get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2

from mavis_dist.decode import Request, Scorer
from mavis_dist.types import UserError
from mavis_dist.vllm.arguments import is_cut_by_vllm, request_of
from mavis_dist.vllm.served import ends_of, served
from mavis_dist.vllm.steerer import Steered, Steerer
from mavis_dist.vllm.versions import check_version

logger = logging.getLogger(__name__)


class Steering(RunnerV1, RunnerV2):
    """Tilts the logits of the requests that give `objective_weights`; leaves all others alone."""

    def __init__(
        self, vllm_config: Any, host: torch.device | LogitsProcRequestState, is_pin_memory: bool | None = None
    ):
        """
        Args:
            host: of model runner V1 the device, of V2 the state of all requests.

        Raises:
            SystemExit: after one line in the log that says what cannot be served and why.
        """
        try:
            _check_host(vllm_config)
            self._served = served()
            model = vllm_config.model_config
            self._vocabulary = model.get_vocab_size()
            self._steerer = _steerer(vllm_config, self._vocabulary, getattr(host, "device", host))
        except UserError as error:
            logger.error("steering cannot start: %s", error)
            raise SystemExit(f"mavis_dist.vllm: {error}") from None
        self._state = host if isinstance(host, LogitsProcRequestState) else None
        self._answers: dict[int, Steered] = {}  # by row (V1) or slot (V2)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what cannot be steered, with HTTP 400; raises RequestError, a ValueError."""
        known = served()
        if request_of(sampling_params, known) is None or known.failure_id is None:
            return
        # Here vLLM stops an answer that fails; `stop_reason` says so.
        if known.failure_id not in (sampling_params.stop_token_ids or ()):
            sampling_params.stop_token_ids = [*(sampling_params.stop_token_ids or ()), known.failure_id]

    def is_argmax_invariant(self) -> bool:
        return False

    # --- model runner V1: rows are those of a batch, whose changes are announced ----------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        before = set(self._answers.values())
        process_dict_updates(self._answers, batch_update, self._steered)
        self._close(before - set(self._answers.values()))

    # --- model runner V2: rows are slots, and tokens lie on the device --------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._close([answer for slot, answer in self._answers.items() if slot == req_idx])
        self._answers.pop(req_idx, None)
        answer = self._steered(sampling_params, [], [])  # its tokens are read when its prompt is complete
        if answer is not None:
            self._answers[req_idx] = answer
        return answer is not None

    def _placed(self, context: LogitsContext) -> dict[int, Steered]:
        """The answers of this step by row, with the tokens that they have now."""
        state, slots = self._state, context.idx_mapping_np.tolist()
        assert state is not None
        steered = [row for row, slot in enumerate(slots) if slot in self._answers]
        if not steered:
            return {}
        lengths = (context.pos[steered] + 1).tolist()  # waits for the device, which has the last tokens
        tokens = context.input_ids[steered].tolist()
        prefill, prompts = state.prefill_len.np, state.prompt_len.np
        placed = {}
        for row, length, token in zip(steered, lengths, tokens, strict=True):
            slot = slots[row]
            if length < prefill[slot]:
                continue  # a part of a prompt: what is sampled is discarded
            answer = self._answers[slot]
            if not answer.request.prompt or length - len(answer.request.prompt) != len(answer.generated) + 1:
                prompt_length = int(prompts[slot])
                read = state.all_token_ids.gpu[slot, :length].tolist()
                answer.request = replace(answer.request, prompt=tuple(read[:prompt_length]))
                answer.generated = read[prompt_length:]
            else:
                answer.generated.append(token)  # type: ignore[attr-defined]
            placed[row] = answer
        return placed

    # --- both -----------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        if not self._answers:
            return logits
        placed = dict(sorted(self._answers.items())) if ctx is None else self._placed(ctx)
        if not placed:
            return logits
        index = torch.tensor(list(placed), device=logits.device)
        rows_BV = logits[index]
        if self._steerer is not None:
            self._steerer.steer(list(placed.values()), rows_BV)
        logits[index] = get_tp_group().broadcast(rows_BV)
        return logits

    def _steered(self, params: Any, prompt: Sequence[int] | None, generated: list[int]) -> Steered | None:
        request = request_of(params, self._served, self._vocabulary)
        if request is None:
            return None
        answer = Steered(replace(request, prompt=tuple(prompt or ())), generated)
        answer.is_drawn_here = not _is_sampled_by_vllm(params, request)
        if prompt is None:
            answer.error = "its prompt is given as embeddings, which value models cannot read"
        return answer

    def _close(self, answers: Collection[Steered]) -> None:
        if self._steerer is not None and answers:
            self._steerer.close(answers)


def _is_sampled_by_vllm(params: Any, request: Request) -> bool:
    return request.scorer is Scorer.FULL and not is_cut_by_vllm(params, request)


def _steerer(vllm_config: Any, vocabulary: int, device: torch.device) -> Steerer | None:
    """None in all workers of a tensor-parallel group but the first; raises UserError."""
    model, known = vllm_config.model_config, served()
    if get_tp_group().rank_in_group > 0:
        return None
    ends = ends_of(model.model, model.tokenizer, vocabulary)
    guide = known.guide_for(model.model, model.tokenizer, model.dtype, device)
    return Steerer(guide, ends.ids, ends.default_id, vocabulary, known.failure_id)


def _check_host(vllm_config: Any) -> None:
    check_version(vllm.__version__)
    if vllm_config.speculative_config is not None:
        raise UserError("speculative decoding and steering exclude each other: leave --speculative-config out")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UserError("steering was not tested with several pipeline stages: use --tensor-parallel-size alone")
