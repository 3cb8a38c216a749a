"""Whether answers are still good text: variety, repetition, and how likely the base model finds them. No Ray.

A corpus is one answer to every prompt. Distinct-2 falls with the length of a corpus, so only corpora of equally many
answers are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from mavis_dist.models.decoder import text_logits
from mavis_dist.models.load import BaseModel

REPEATED = 4  # words
ROWS = 8  # of a forward pass; bounded by the memory of its logits

Row = tuple[tuple[int, ...], list[int]]  # prompt, answer


class Surprise(NamedTuple):
    """Of one answer under the base model: softmax of all tokens at temperature 1, end token left out."""

    nats: float
    num_tokens: int


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of successive words over all of them, in the whole corpus."""
    pairs = [pair for text in texts for pair in _sequences(text, 2)]
    return len(set(pairs)) / max(1, len(pairs))


def repetition(texts: Sequence[str]) -> float:
    """The share of an answer's sequences of 4 words that occur earlier in it, mean over the answers.

    0 for an answer without sequences of this length.
    """
    found = [_sequences(text, REPEATED) for text in texts]
    return fmean(1 - len(set(sequences)) / len(sequences) if sequences else 0.0 for sequences in found)


def perplexity(base: BaseModel, prompts: Sequence[tuple[int, ...]], texts: Sequence[str]) -> float:
    """exp of the mean surprise, in nats, of all tokens of the answers to these prompts (token ids)."""
    found = surprises(base, prompts, texts)
    return math.exp(math.fsum(one.nats for one in found) / max(1, sum(one.num_tokens for one in found)))


def surprises(base: BaseModel, prompts: Sequence[tuple[int, ...]], texts: Sequence[str]) -> list[Surprise]:
    """Of every answer to these prompts (token ids)."""
    answers = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = list(zip(prompts, answers, strict=True))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))  # batches of similar length
    found = [0.0] * len(rows)
    for start in range(0, len(order), ROWS):
        batch = order[start : start + ROWS]
        for i, nats in zip(batch, _surprise(base, [rows[i] for i in batch]), strict=True):
            found[i] = nats
    return [Surprise(nats, len(answer)) for nats, answer in zip(found, answers, strict=True)]


@torch.inference_mode()
def _surprise(base: BaseModel, rows: Sequence[Row]) -> list[float]:
    """Sum of -log p over the tokens of every answer, nats."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    # Padding on the right: no token attends to it.
    ids = torch.tensor([[*prompt, *answer, *[0] * (length - len(prompt) - len(answer))] for prompt, answer in rows])
    logits_BLV = text_logits(base.model, ids)
    found = []
    for b, (prompt, answer) in enumerate(rows):
        logits_AV = logits_BLV[b, len(prompt) - 1 : len(prompt) + len(answer) - 1].float().cpu()
        loss = torch.nn.functional.cross_entropy(logits_AV, torch.tensor(answer, dtype=torch.int64), reduction="sum")
        found.append(float(loss))
    return found


def _sequences(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
