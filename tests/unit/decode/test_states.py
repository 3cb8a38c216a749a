"""Guides of value models on the base model's states, alone and beside models of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mavis_dist.decode import Choice, Engine, GuideRow, LocalGuide, Request, SamplingParams, Scorer
from tests.fakes import tiny_base, tiny_states, tiny_value

PROMPT = (1, 5, 6, 7)


def requests(scorer: Scorer, weights: dict[str, float]) -> list[Request]:
    return [
        Request(str(i), (1, 20 + i, *range(5, 9 + i)), weights, 6.0, 1.0, params=params, scorer=scorer)
        for i in range(6)
        for params in [SamplingParams(max_tokens=6 + i, seed=i, n=1 + i % 2)]
    ]


def tokens(choices: list[list[Choice]]) -> list[list[list[int]]]:
    return [[choice.tokens for choice in row] for row in choices]


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_lazy_draws_the_tokens_of_full(head_size: int) -> None:
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models = {"brief": tiny_states(base, 3), "kind": tiny_states(base, 4)}
    weights = {"brief": 0.4, "kind": 0.6}
    full, lazy = (
        Engine(base, LocalGuide(models)).generate(requests(scorer, weights)) for scorer in (Scorer.FULL, Scorer.LAZY)
    )
    assert tokens(full) == tokens(lazy)
    plain = Engine(base).generate(requests(Scorer.FULL, {}))
    assert tokens(full) != tokens(plain)


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_kinds_mix_in_one_guide(head_size: int) -> None:
    """Values of a mixture are those of each model alone, and heads on one layer share a pass."""
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models = {
        "a": tiny_states(base, 3),
        "b": tiny_value(1, head_size=head_size),
        "c": tiny_states(base, 4, num_objectives=2),
        "d": tiny_states(base, 5, layer=2),
    }
    guide = LocalGuide({name: (model, model.num_objectives - 1) for name, model in models.items()})
    assert len(guide._trunks) == 3
    row = GuideRow(0, PROMPT, frozenset(models))
    candidates_N = torch.tensor([9, 30, 31])
    opened_BM, scored_NM = guide.open([row]), guide.score([0], [3], candidates_N)
    for m, (name, model) in enumerate(models.items()):
        for n, last in enumerate([(), *((int(token),) for token in candidates_N)]):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([[*PROMPT, *last]]))[0, -1, -1]
            found = opened_BM[0, m] if n == 0 else scored_NM[n - 1, m]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


def test_objectives_on_one_layer_come_and_go_while_rows_stay() -> None:
    base = tiny_base(head_size=64)
    first, second, third = (tiny_states(base, seed) for seed in (3, 4, 5))
    guide, row = LocalGuide({"b": second}), GuideRow(0, PROMPT, frozenset({"b"}))
    expected = float(guide.open([row])[0, 0])
    guide.add({"a": first, "c": third})
    assert len(guide._trunks) == 1
    values_BM = guide.extend([0], [[9]])
    fresh = LocalGuide({"b": second})
    fresh.open([row])
    assert values_BM[0, 1] == fresh.extend([0], [[9]])[0, 0] != expected
    guide.remove({"a"})
    guide.keep([0], torch.tensor([1])) if guide.score([0], [2], torch.tensor([11, 12])) is not None else None
    fresh.score([0], [2], torch.tensor([11, 12]))
    fresh.keep([0], torch.tensor([1]))
    assert guide.extend([0], [[13]])[0, 0] == fresh.extend([0], [[13]])[0, 0]
    other = GuideRow(1, PROMPT, frozenset({"b", "c"}))
    np.testing.assert_allclose(guide.open([other])[0, 0], expected, atol=1e-6)


def test_an_answer_does_not_depend_on_the_others_models() -> None:
    base = tiny_base(eos_boost=1.0, head_size=64)
    models = {"a": tiny_states(base, 3), "b": tiny_value(1, head_size=64)}
    mixed = [
        replace(r, weights=w)
        for r, w in zip(requests(Scorer.LAZY, {}), [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 0.7}] * 2, strict=True)
    ]
    together = Engine(base, LocalGuide(models)).generate(mixed)
    alone = [Engine(base, LocalGuide({n: models[n] for n in r.weights})).generate([r])[0] for r in mixed]
    assert tokens(together) == tokens(alone)
