"""Figures of texts by hand, and perplexity against a plain softmax."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mavis_dist.compare.text_quality import distinct_2, perplexity, repetition
from mavis_dist.models.load import load_base
from tests.tiny import write_base


def test_distinct_pairs_and_repeated_words_by_hand() -> None:
    assert distinct_2(["A b a b", "a B", ""]) == pytest.approx(2 / 4)
    assert repetition(["a b c d a b c d", "a b c"]) == pytest.approx((1 / 5 + 0) / 2)
    assert (distinct_2([""]), repetition([""])) == (0.0, 0.0)


def test_perplexity_is_that_of_a_plain_softmax_whatever_shares_its_batch(tmp_path: Path) -> None:
    base = load_base(str(write_base(tmp_path)))
    prompts = [base.chat(text) for text in ("one", "a longer question", "x")]
    texts = ["yes it is", "no", ""]
    surprise, num_tokens = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        answer = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        for t, token in enumerate(answer):
            with torch.inference_mode():
                logits_V = base.model(torch.tensor([[*prompt, *answer[:t]]])).logits[0, -1]
            surprise -= float(logits_V.log_softmax(-1)[token])
        num_tokens += len(answer)
    assert perplexity(base, prompts, texts) == pytest.approx(math.exp(surprise / num_tokens), rel=1e-4)
    assert perplexity(base, prompts[:1], [""]) == 1.0
