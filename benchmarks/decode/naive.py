"""A plain implementation of value-guided decoding (arXiv 2508.13415), the reference for the engine.

One request at a time, and one value model after the other; the candidates are a batch of sequences with the same
prefix.

Shapes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from mavis_dist.decode import Request
from mavis_dist.decode.validate import normalise_weights
from mavis_dist.models.load import BaseModel
from mavis_dist.models.value import ValueModel


class Lookahead:
    """One value model with the key-value cache of one answer."""

    def __init__(self, model: ValueModel, tokens: Sequence[int]):
        self._model, self._cache = model, DynamicCache()
        self._values(torch.tensor([tokens]))

    def score(self, ids_K: torch.Tensor) -> torch.Tensor:
        """V(s∘a) [K] of candidate next tokens; call `keep` with one of them before the next call."""
        layer: Any
        for layer in self._cache.layers:
            layer.keys, layer.values = (x.expand(len(ids_K), -1, -1, -1) for x in (layer.keys, layer.values))
        return self._values(ids_K[:, None])[:, 0]

    def keep(self, index: int) -> None:
        """Continue with one of the candidates."""
        self._cache.batch_select_indices(torch.tensor([index]))

    def _values(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)[:, :, 0]


@torch.inference_mode()
def answer(base: BaseModel, models: Mapping[str, ValueModel], request: Request) -> list[int]:
    """The tokens of one answer. As published, the tilt has no cap and all candidates are scored."""
    weights = normalise_weights(request.weights, models)
    lookaheads = {name: Lookahead(models[name], request.prompt) for name in weights}
    generator = torch.Generator().manual_seed(request.params.seed or 0)
    cache = DynamicCache()
    tokens: list[int] = []
    while len(tokens) < request.params.max_tokens:
        logits_V = _logits(base, cache, tokens[-1:] or request.prompt)
        if not tokens:
            logits_V[list(base.eos_ids)] = float("-inf")  # an answer has at least one token
        logprobs_K, ids_K = torch.log_softmax(logits_V, -1).topk(request.params.top_k)
        for name, lookahead in lookaheads.items():
            logprobs_K = logprobs_K + request.beta * weights[name] * lookahead.score(ids_K)
        index = _sample(logprobs_K, request.params.temperature, generator)
        for lookahead in lookaheads.values():
            lookahead.keep(index)
        tokens.append(int(ids_K[index]))
        if tokens[-1] in base.eos_ids:
            break
    return tokens


def _logits(base: BaseModel, cache: DynamicCache, new: Sequence[int]) -> torch.Tensor:
    out = base.model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[0, -1].float()


def _sample(scores_K: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores_K.argmax())
    return int(torch.multinomial(torch.softmax(scores_K / temperature, -1), 1, generator=generator))
