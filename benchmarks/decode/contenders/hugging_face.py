"""Hugging Face `generate`, with prompts padded to the longest."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import lines


def load(options: dict[str, Any]) -> dict[str, lines.Decode]:
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        torch.manual_seed(seed)
        answers = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=options["top_k"],
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return int(answers[:, ids.shape[1] :].numel())

    return {"hf": decode}


if __name__ == "__main__":
    lines.serve("transformers", load)
