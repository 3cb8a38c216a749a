"""Whether steered answers are still good text: variety, repetition, and how likely the base model finds them. No Ray.

A corpus is one answer to every prompt. Distinct-2 falls with the length of a corpus, so only corpora of equally many
answers are compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev

import torch

from benchmarks.common.result_cache import result_path
from mavis_dist.config import Config
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt

REPEATED = 4  # words
ROWS = 8  # of a forward pass; bounded by the memory of its logits


@dataclass(frozen=True)
class TextQuality:
    """Figures of one corpus."""

    distinct_2: float  # different pairs of successive words / all of them, over the whole corpus
    repetition: float  # share of an answer's sequences of 4 words that occur earlier in it, mean over the answers
    perplexity: float  # under the base model: softmax of all tokens at temperature 1, end tokens left out


@dataclass(frozen=True)
class TextRatios:
    """Figures of steered answers over those of the base model's."""

    beta: float  # strength that was measured
    kl: float  # nats of an answer at this strength
    distinct_2: float | None  # None: that of the base model is 0
    repetition: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Spread:
    """One figure of several corpora of the base model."""

    mean: float
    sd: float  # what chance alone changes between two corpora, once


def measure(
    config: Config, store: Store, prompts: Sequence[Prompt], corpora: Mapping[str, Sequence[str]]
) -> dict[str, TextQuality]:
    """The figures of every corpus, by name; stored perplexities are read."""
    inputs = {
        "base": config.base.model_dump(mode="json", exclude={"device"}),
        "prompts": [prompt.text for prompt in prompts],
    }
    paths = {
        name: result_path("perplexity", name.replace(" ", "").replace("/", "-"), {**inputs, "texts": list(texts)})
        for name, texts in corpora.items()
    }
    missing = [name for name, path in paths.items() if not store.exists(path)]
    if missing:
        torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
        base = load_base(config.base.model, config.base.dtype, config.base.device)
        tokens = [base.chat(prompt.text, config.base.system) for prompt in prompts]
        for done, name in enumerate(missing, 1):
            store.write_json(paths[name], perplexity(base, tokens, corpora[name]))
            print(f"{'perplexity':<24} {done}/{len(missing)}: {name}", file=sys.stderr, flush=True)
    return {
        name: TextQuality(distinct_2(texts), repetition(texts), store.read_json(paths[name]))
        for name, texts in corpora.items()
    }


def distinct_2(texts: Sequence[str]) -> float:
    pairs = [pair for text in texts for pair in _sequences(text, 2)]
    return len(set(pairs)) / max(1, len(pairs))


def repetition(texts: Sequence[str]) -> float:
    """0 for an answer without sequences of this length."""
    found = [_sequences(text, REPEATED) for text in texts]
    return fmean(1 - len(set(sequences)) / len(sequences) if sequences else 0.0 for sequences in found)


def perplexity(base: BaseModel, prompts: Sequence[tuple[int, ...]], texts: Sequence[str]) -> float:
    """exp of the mean surprise, in nats, of all tokens of the answers to these prompts (token ids)."""
    answers = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    surprise = sum(_surprise(base, rows[start : start + ROWS]) for start in range(0, len(rows), ROWS))
    return math.exp(surprise / max(1, sum(map(len, answers))))


def ratios(beta: float, kl: float, steered: TextQuality, base: Mapping[str, Spread]) -> TextRatios:
    found = {
        name: figure / base[name].mean if base[name].mean > 0 else None for name, figure in asdict(steered).items()
    }
    return TextRatios(beta, kl, **found)


def spreads(corpora: Sequence[TextQuality]) -> dict[str, Spread]:
    """Every figure over several corpora of the base model."""
    columns = {name: [asdict(corpus)[name] for corpus in corpora] for name in asdict(corpora[0])}
    return {name: Spread(fmean(column), pstdev(column)) for name, column in columns.items()}


@torch.inference_mode()
def _surprise(base: BaseModel, rows: Sequence[tuple[tuple[int, ...], list[int]]]) -> float:
    """Sum of -log p over the tokens of the answers of some (prompt, answer), nats."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    # Padding on the right: no token attends to it.
    ids = torch.tensor([[*prompt, *answer, *[0] * (length - len(prompt) - len(answer))] for prompt, answer in rows])
    logits_BLV = base.model(input_ids=ids.to(base.model.device)).logits
    surprise = 0.0
    for b, (prompt, answer) in enumerate(rows):
        logits_AV = logits_BLV[b, len(prompt) - 1 : len(prompt) + len(answer) - 1].float().cpu()
        surprise += float(
            torch.nn.functional.cross_entropy(logits_AV, torch.tensor(answer, dtype=torch.int64), reduction="sum")
        )
    return surprise


def _sequences(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
