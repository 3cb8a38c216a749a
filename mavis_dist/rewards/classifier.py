"""A Hugging Face sequence classifier, or a reward model with one output, read as a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mavis_dist.rewards.limits import max_tokens
from mavis_dist.rewards.protocol import RewardError


class Classifier:
    """One output of a sequence classifier on the filled-in template, as logit or as softmax probability.

    Texts that are too long are truncated at the start, so that the end of the answer is scored.
    """

    def __init__(
        self,
        model: str,
        label: int | str = 0,
        template: str = "{answer}",
        output: str = "logit",
        device: str = "cpu",
        batch_size: int = 16,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        from mavis_dist.models.directory import read_model, read_tokenizer
        from mavis_dist.models.fetch import fetch
        from mavis_dist.models.load import move

        directory = fetch(model)
        self.model = move(read_model(AutoModelForSequenceClassification, directory), device)
        self.tokenizer = read_tokenizer(directory)
        self.template, self.output = template, output
        self.label = _label_index(label, self.model.config, model)
        if output == "probability" and self.model.config.num_labels == 1:
            raise RewardError(
                f"classifier {model!r} has one output, and its softmax probability is always 1: set output to logit"
            )
        self.batch_size = batch_size if _agree_on_padding(self.tokenizer, self.model.config) else 1
        # A causal model can score an empty text only through a token in its place.
        self.nothing = self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        self.max_tokens = max_tokens(self.tokenizer, self.model)

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        pairs = zip(prompts, answers, strict=True)
        texts = [fill(self.template, prompt, answer) or self.nothing for prompt, answer in pairs]
        # Batches of texts of similar length need little padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, score in zip(batch, self._score_batch([texts[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    def _score_batch(self, texts: list[str]) -> list[float]:
        import torch

        inputs = self.tokenizer(
            texts, padding=len(texts) > 1, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            logits_BL = self.model(**inputs.to(self.model.device)).logits.float()
        outputs_BL = logits_BL.softmax(-1) if self.output == "probability" else logits_BL
        return outputs_BL[:, self.label].tolist()


def fill(template: str, prompt: str, answer: str) -> str:
    """The template with {prompt} and {answer} filled in; braces within the two texts are kept."""
    texts = {"{prompt}": prompt, "{answer}": answer}
    return re.sub(r"\{prompt\}|\{answer\}", lambda found: texts[found[0]], template)


def _label_index(label: int | str, config: Any, model: str) -> int:
    names = [config.id2label[index] for index in range(config.num_labels)]
    if label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    known = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    raise RewardError(f"classifier {model!r} has no label {label!r}: choose one of {known}")


def _agree_on_padding(tokenizer: Any, config: Any) -> bool:
    """Makes tokenizer and model pad with the same token, on the right, and truncate on the left.

    Returns False if neither has a padding token. Texts are then scored one by one: with the end-of-text token as
    padding, causal models could not find the true end of a text that contains it, where they read their score.
    """
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    if tokenizer.pad_token_id is None and config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token_id is not None
