"""Relevance of an answer to its prompt, by sentence embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis_dist.rewards.limits import max_tokens

if TYPE_CHECKING:
    import torch


class Relevance:
    """Cosine of the mean-pooled embeddings of prompt and answer, -1 to 1; Reimers and Gurevych, arXiv 1908.10084.

    An empty answer or prompt scores 0. Text beyond the embedder's maximum length is truncated.
    """

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 32) -> None:
        from transformers import AutoModel

        from mavis_dist.models.directory import read_model, read_tokenizer
        from mavis_dist.models.fetch import fetch
        from mavis_dist.models.load import move

        directory = fetch(model)
        self.tokenizer = read_tokenizer(directory)
        # Mean pooling does not use the pooler: embedders may be saved without one.
        self.model = move(read_model(AutoModel, directory, optional=("pooler.",)), device)
        self.max_tokens = _max_tokens(directory, self.tokenizer, self.model)
        self.batch_size = batch_size

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        # Answers share prompts; sorting by length reduces padding; an empty text may have no tokens.
        texts = sorted({text: None for text in [*prompts, *answers] if text.strip()}, key=len)
        rows = {text: row for row, text in enumerate(texts)}
        embeddings_ND = self._embed(texts)
        return [
            float(embeddings_ND[rows[prompt]] @ embeddings_ND[rows[answer]])
            if prompt in rows and answer in rows
            else 0.0
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors [N, D]."""
        import torch

        if not texts:
            return torch.zeros(0, 0)
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        return torch.cat([self._embed_batch(batch) for batch in batches])

    def _embed_batch(self, texts: list[str]) -> torch.Tensor:
        import torch

        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        with torch.inference_mode():
            hidden_BTD = self.model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1)
        # Normalising makes the division by the number of tokens unnecessary.
        return torch.nn.functional.normalize((hidden_BTD * mask_BT1).sum(1), dim=-1).float().cpu()


def _max_tokens(directory: Path, tokenizer: Any, model: Any) -> int:
    """The maximum length in a sentence-transformers model's settings, else that of the network."""
    settings, limit = directory / "sentence_bert_config.json", max_tokens(tokenizer, model)
    stated = json.loads(settings.read_text()).get("max_seq_length") if settings.exists() else None
    return min(limit, stated or limit)
