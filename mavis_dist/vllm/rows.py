"""vLLM computes the base model's rows for this project's engine, which schedules, guides and draws as ever.

`VllmRows` stands where `SlotModel` stands otherwise. A row is a request to vLLM that never ends by itself. A step of
vLLM computes logits and samples from them; here a logits processor interrupts it between the two: `append` returns the
logits, and the next call of `append` brings the tokens with which the step goes on. Both take turns in one thread: with
two of them, the threads that each has for its matrix products would take the cores from each other.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from greenlet import greenlet

from mavis_dist.models.directory import check_seal, fingerprint_model
from mavis_dist.models.fetch import fetch
from mavis_dist.models.load import BaseModel, load_skeleton
from mavis_dist.vllm.versions import check_installed

MOST_BATCHED_TOKENS = 8192  # of prompts in a step, unless one alone is longer
# Of vLLM's environment variables: no statistics are sent; on processors, room for keys and values in GiB, and threads
# on any of the cores, which others use as well.
DEFAULTS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ANY_TOKEN = 0  # of a row that nobody reads any more


@dataclass
class _Row:
    """A row, and the request that computes it."""

    tokens: list[int]
    request: str | None = None  # None: it has to be sent, with all its tokens as the prompt
    num_known: int = 0  # tokens that vLLM has, or has been given


@dataclass
class Interrupted:
    """A step that waits for tokens."""

    requests: list[str]  # in the order of the logits
    logits_BV: torch.Tensor


class VllmHost:
    """A vLLM engine in this process. One step at a time, started and interrupted here."""

    def __init__(self, model: str, dtype: str, device: str, max_context: int, max_rows: int):
        """Raises UserError: vLLM is not installed, or of a version that was not tested."""
        check_installed()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its steps are made in this process
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mavis_dist.vllm.interrupt import interrupting, start  # loads vLLM

        self.max_rows, self.max_context, self.device = max_rows, max_context, torch.device(device)
        self._engine = start(
            model, dtype, interrupting(self._interrupt), max_context, max_rows, max(MOST_BATCHED_TOKENS, max_context)
        )
        self._names = map(str, count())
        self._step: greenlet | None = None  # interrupted

    def add(self, tokens: Sequence[int]) -> str:
        """A request that continues these tokens, between two steps; its name."""
        from mavis_dist.vllm.interrupt import endless

        name = next(self._names)
        prompt = {"prompt_token_ids": list(tokens)}
        self._engine.add_request(name, prompt, endless(name, len(tokens), self.max_context))
        return name

    def abort(self, requests: Sequence[str]) -> None:
        """End requests, between two steps."""
        if requests:
            self._engine.abort_request(list(requests))

    def begin(self) -> Interrupted | None:
        """Begin a step; None if it computes nothing."""
        self._step = greenlet(self._engine.step)
        with torch.inference_mode():  # a property of the thread, which vLLM sets at the begin of its step
            interrupted = self._step.switch()
        return interrupted if isinstance(interrupted, Interrupted) else None

    def finish(self, tokens: Sequence[int]) -> None:
        """Let the interrupted step append these tokens, one for each of its requests; in the thread that began it."""
        assert self._step is not None
        with torch.inference_mode():
            self._step.switch(tokens)
        self._step = None

    def _interrupt(self, requests: list[str], logits_BV: torch.Tensor) -> Sequence[int]:
        """Within a step: hand over the logits, and go on with the tokens."""
        parent = greenlet.getcurrent().parent
        assert parent is not None
        tokens: Sequence[int] = parent.switch(Interrupted(requests, logits_BV.clone()))
        return tokens


class VllmRows:
    """The rows of one engine; see `mavis_dist.models.rows.Rows`."""

    is_batch_invariant = False
    reads_answers = False
    states: torch.Tensor | None = None

    def __init__(self, host: VllmHost, vocabulary: int):
        self._host, self._vocabulary = host, vocabulary
        self.device = host.device
        self._rows: dict[int, _Row] = {}
        self._step: Interrupted | None = None
        self._closed: list[str] = []

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self._rows.values())

    def read_states(self, layer: int | None) -> bool:
        return False

    def reserve(self, num_rows: int, longest: int) -> None:
        assert num_rows <= self._host.max_rows

    def open(self, row: int, source: int | None = None, shared: int = 0) -> int:
        """vLLM finds by itself which keys and values it has."""
        tokens = self._rows[source].tokens[:shared] if source is not None and source in self._rows else []
        self._rows[row] = _Row(tokens)
        return len(tokens)

    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_read: Sequence[int] | None = None
    ) -> torch.Tensor:
        """They are computed with the token that follows."""
        assert num_read is not None
        assert not any(num_read)
        for row, new in zip(rows, tokens, strict=True):
            self._rows[row].tokens += new
        return torch.empty(0, self._vocabulary, device=self.device)

    def append(self, rows: Sequence[int], tokens_B: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] behind one more token of each row."""
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            self._rows[row].tokens.append(token)
        self._finish_step()
        logits: dict[int, torch.Tensor] = {}
        while len(logits) < len(rows):
            missing = [row for row in rows if row not in logits]
            self._send(missing)
            logits |= self._begin_step(missing)
            if len(logits) < len(rows):
                # vLLM had no room for all of them: those that it computed wait outside, their keys and values cached.
                self._finish_step()
        return torch.stack([logits[row] for row in rows])

    def close(self, row: int) -> None:
        closed = self._rows.pop(row)
        if closed.request is not None:
            self._closed.append(closed.request)
        if not self._rows:
            self._finish_step()
            self._send([])

    def _send(self, rows: Sequence[int]) -> None:
        """Between two steps: end the requests of closed rows, and of those that went another way; begin new ones."""
        ended, self._closed = self._closed, []
        for row in self._rows.values():
            if row.request is not None and row.num_known != len(row.tokens):
                ended.append(row.request)
                row.request = None
        self._host.abort(ended)
        for number in rows:
            row = self._rows[number]
            if row.request is None:
                row.request, row.num_known = self._host.add(row.tokens), len(row.tokens)

    def _begin_step(self, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        """The logits of those rows that vLLM computes in this step."""
        self._step = self._host.begin()
        if self._step is None:
            raise RuntimeError("vLLM computes none of the rows: its cache is too small for one of them")
        names = {self._rows[number].request: number for number in rows}
        found = zip(self._step.requests, self._step.logits_BV, strict=True)
        return {names[name]: logits_V for name, logits_V in found if name in names}

    def _finish_step(self) -> None:
        """Give the interrupted step the tokens that are known; rows that have none leave it."""
        if self._step is None:
            return
        owners = {row.request: row for row in self._rows.values() if row.request is not None}
        tokens = []
        for name in self._step.requests:
            row = owners.get(name)
            if row is not None and row.num_known < len(row.tokens):
                tokens.append(row.tokens[row.num_known])
                row.num_known += 1
            else:
                tokens.append(ANY_TOKEN)
                if row is not None:
                    row.num_known = -1  # it goes on with a token that is not its own
        self._host.finish(tokens)
        self._step = None


def load_base(name: str, dtype: str, device: str, max_rows: int) -> BaseModel:
    """A base model that vLLM computes; as `models.load.load_base`, up to `max_rows` rows at a time.

    Raises:
        UserError: the model cannot be used, or vLLM.
    """
    directory = fetch(name)
    fingerprint = fingerprint_model(directory)
    check_seal(directory, fingerprint)
    skeleton = load_skeleton(name, dtype)
    host = VllmHost(str(directory), dtype, device, skeleton.max_context, max_rows)
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    return replace(skeleton, fingerprint=fingerprint, rows=lambda: VllmRows(host, vocabulary))
