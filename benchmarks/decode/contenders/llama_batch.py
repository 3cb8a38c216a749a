"""llama.cpp through its batch interface: all prompts in one pass, then all answers side by side."""

from __future__ import annotations

from typing import Any

import llama_cpp

from benchmarks.common import lines

MAX_TOKENS = 2048  # of a pass


class Rows:
    """A model in a GGUF file, and the answers that it generates side by side."""

    def __init__(self, file: str, options: dict[str, Any]):
        model_params, params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
        model = llama_cpp.llama_model_load_from_file(file.encode(), model_params)
        params.n_ctx = options["max_rows"] * options["max_length"]
        params.n_batch, params.n_seq_max, params.kv_unified = MAX_TOKENS, options["max_rows"], True
        params.n_threads = params.n_threads_batch = options["threads"]
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)
        self._top_k = options["top_k"]

    def decode(self, prompts: list[list[int]], tokens: int, seed: int) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        samplers = [self._sampler(seed + row) for row in range(len(prompts))]
        lengths = [len(prompt) for prompt in prompts]
        new = self._prefill(prompts, samplers)
        for step in range(1, tokens):
            for row, token in enumerate(new):
                self._add(token, lengths[row] + step - 1, row, True)
            self._run()
            new = [llama_cpp.llama_sampler_sample(samplers[row], self._context, row) for row in range(len(prompts))]
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return tokens * len(prompts)

    def _prefill(self, prompts: list[list[int]], samplers: list[Any]) -> list[int]:
        """The first token of every answer."""
        new: dict[int, int] = {}
        ends: dict[int, int] = {}  # by row: index in the batch
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                is_last = position == len(prompt) - 1
                if is_last:
                    ends[row] = self._batch.n_tokens
                self._add(token, position, row, is_last)
                if self._batch.n_tokens == MAX_TOKENS or (is_last and row == len(prompts) - 1):
                    self._run()
                    new |= {r: llama_cpp.llama_sampler_sample(samplers[r], self._context, i) for r, i in ends.items()}
                    ends.clear()
        return [new[row] for row in range(len(prompts))]

    def _sampler(self, seed: int) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(self._top_k))
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
        return chain

    def _add(self, token: int, position: int, row: int, is_read: bool) -> None:
        batch, i = self._batch, self._batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, is_read
        batch.seq_id[i][0] = row
        batch.n_tokens += 1

    def _run(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        assert status == 0, f"llama_decode returned {status}"
        self._batch.n_tokens = 0


def load(options: dict[str, Any]) -> dict[str, lines.Decode]:
    return {name: Rows(file, options).decode for name, file in options["files"].items()}


if __name__ == "__main__":
    lines.serve("llama-cpp-python", load)
