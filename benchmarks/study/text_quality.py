"""The text of steered answers beside that of the base model's own. No Ray."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev

import torch

from benchmarks.common.result_cache import result_path
from mavis_dist.compare.text_quality import distinct_2, perplexity, repetition
from mavis_dist.config import Config
from mavis_dist.models.load import load_base
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt


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
        tokens = [base.chat(prompt.messages, config.base.system) for prompt in prompts]
        for done, name in enumerate(missing, 1):
            store.write_json(paths[name], perplexity(base, tokens, corpora[name]))
            print(f"{'perplexity':<24} {done}/{len(missing)}: {name}", file=sys.stderr, flush=True)
    return {
        name: TextQuality(distinct_2(texts), repetition(texts), store.read_json(paths[name]))
        for name, texts in corpora.items()
    }


def ratios(beta: float, kl: float, steered: TextQuality, base: Mapping[str, Spread]) -> TextRatios:
    found = {
        name: figure / base[name].mean if base[name].mean > 0 else None for name, figure in asdict(steered).items()
    }
    return TextRatios(beta, kl, **found)


def spreads(corpora: Sequence[TextQuality]) -> dict[str, Spread]:
    """Every figure over several corpora of the base model."""
    columns = {name: [asdict(corpus)[name] for corpus in corpora] for name in asdict(corpora[0])}
    return {name: Spread(fmean(column), pstdev(column)) for name, column in columns.items()}
