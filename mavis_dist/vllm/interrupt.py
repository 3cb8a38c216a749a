"""What `rows` needs of vLLM: an engine whose steps are interrupted between logits and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from mavis_dist.vllm.versions import check_version

ROW = "mavis_row"
Interrupt = Callable[[list[str], torch.Tensor], Sequence[int]]


def interrupting(interrupt: Interrupt) -> type[LogitsProcessor]:
    """A logits processor that leaves one token of each row: what `interrupt` returns for their names and logits."""

    class Interrupting(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
            self._names: dict[int, str] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            process_dict_updates(self._names, batch_update, lambda params, prompt, output: params.extra_args[ROW])

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            rows = sorted(self._names)
            tokens = interrupt([self._names[row] for row in rows], logits[rows])
            logits.fill_(-math.inf)
            logits[rows, list(tokens)] = 0.0
            return logits

    return Interrupting


def start(
    model: str, dtype: str, processor: type[LogitsProcessor], max_context: int, max_rows: int, batched_tokens: int
) -> LLMEngine:
    """Raises UserError: vLLM is of a version that was not tested."""
    check_version(vllm.__version__)
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            dtype=dtype,
            logits_processors=[processor],
            max_model_len=max_context,
            max_num_seqs=max_rows,
            max_num_batched_tokens=batched_tokens,
            enable_chunked_prefill=False,  # whoever is in a step has logits
            async_scheduling=False,
            enforce_eager=current_platform.is_cpu(),  # compiling takes minutes there, and recording is not possible
            disable_log_stats=True,
        )
    )


def endless(name: str, prompt_length: int, max_context: int) -> SamplingParams:
    """Of a request that ends when it is aborted, or when there is no room any more."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=max(1, max_context - prompt_length),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={ROW: name},
    )
