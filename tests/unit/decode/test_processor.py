"""The tilt inside `model.generate`: the engine's answers and distribution, however transformers arranges the rows.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from mavis_dist.core.tilt import candidates, tilt
from mavis_dist.decode import Engine, LocalGuide, Request, RequestError, SamplingParams, TiltProcessor
from mavis_dist.models.value import ValueModelError
from tests.fakes import EOS, CountingGuide, tiny_base, tiny_value

PAD = 0
BASE = tiny_base(seed=0, eos_boost=2.0)
MODELS = {"brief": tiny_value(1), "kind": tiny_value(2, layers=2)}
WEIGHTS = {"kind": 3.0, "brief": 1.0}
PROMPTS = [(1, 5), (1, 6, 20, 21, 22, 23), (1, 7, 7), (1, 8, 30, 31), (1, EOS, 9), (1, 10, 11, 12, 13)]
MANY = [*PROMPTS, *((1, 40 + i, 20 + 2 * i)[i % 2 :] for i in range(18))]


def processor(guide=None, weights=WEIGHTS, beta=2.0, **fields):
    fields = {"tilt_cap": None, "eos_ids": (EOS,), "pad_id": PAD, **fields}
    return TiltProcessor(guide or LocalGuide(MODELS), weights, beta, **fields)


def padded(prompts):
    """Input ids and attention mask, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(processor_, prompts, **options):
    """The answers [B, new tokens], padded on the right."""
    batch = padded(prompts)
    if options.get("do_sample"):
        options["top_k"] = 0
    settings = GenerationConfig(
        max_new_tokens=12, min_new_tokens=1, eos_token_id=EOS, pad_token_id=PAD, top_p=1.0, **options
    )
    out = BASE.model.generate(**batch, generation_config=settings, logits_processor=[processor_])
    return out[:, batch["input_ids"].shape[1] :]


def tilted_logprobs(ids, scores, cap=None, top_k=40, beta=2.0):
    """log p + delta of one row by whole forward passes; -inf where it is no candidate."""
    one = torch.ones(1)
    ids_1K, logprobs_1K = candidates(scores[None], torch.tensor([top_k]), one, 0 * one, one)

    def values(sequences):
        return torch.stack(
            [MODELS[m](input_ids=torch.tensor(sequences), use_cache=False)[:, -1, 0] for m in WEIGHTS], 1
        )

    delta_1K = tilt(
        values([[*ids, a] for a in ids_1K[0].tolist()])[None],
        values([ids]),
        torch.tensor([list(WEIGHTS.values())]) / sum(WEIGHTS.values()),
        one * beta,
        one * (cap or float("inf")),
        ids_1K == EOS,
    )
    out = torch.full((scores.shape[0],), float("-inf"), dtype=torch.float64)
    out[ids_1K[0]] = (logprobs_1K + delta_1K)[0]
    return out


class Checked(TiltProcessor):
    """Compares every call with a stateless computation, row by row, except for finished answers."""

    num_checked = 0

    def __call__(self, input_ids, scores):
        out = super().__call__(input_ids, scores)
        if not hasattr(self, "start"):
            self.start = input_ids.shape[1]
        for ids, before, after in zip(input_ids.tolist(), scores, out, strict=True):
            if EOS in ids[self.start :]:
                continue
            first = next(i for i, token in enumerate(ids) if token != PAD)
            cap = None if self._cap == float("inf") else self._cap
            expected = tilted_logprobs(ids[first:], before, cap, self._top_k)
            assert (after > float("-inf")).tolist() == (expected > float("-inf")).tolist()
            torch.testing.assert_close(after.double(), expected, atol=1e-4, rtol=1e-4)
            self.num_checked += 1
        return out


@pytest.mark.parametrize("cap", [None, 0.8])
def test_greedy_generation_matches_the_engine_at_temperature_zero(cap):
    """Token for token, in a batch of prompts of different lengths whose answers end at different times."""
    guide = CountingGuide(MODELS)
    tilted = processor(guide, tilt_cap=cap)
    answers = generate(tilted, MANY, do_sample=False)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    requests = [Request(str(i), p, WEIGHTS, 2.0, cap, params) for i, p in enumerate(MANY)]
    expected = [choice.tokens for [choice] in Engine(BASE, LocalGuide(MODELS)).generate(requests)]
    assert [row[: len(tokens)] for row, tokens in zip(answers.tolist(), expected, strict=True)] == expected
    assert len({len(tokens) for tokens in expected}) > 1
    # Only prompts are encoded; all further tokens are kept candidates.
    assert guide.num_read == sum(map(len, MANY))
    tilted.close()
    assert guide.rows == set()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("fields", [{}, {"tilt_cap": 0.8, "top_k": 7}], ids=str)
def test_the_distribution_is_correct_however_rows_are_rearranged(options, fields):
    """Sampling, several answers to a prompt, and beams that are dropped, duplicated and reordered."""
    torch.manual_seed(0)
    guide = CountingGuide(MODELS)
    tilted = Checked(guide, WEIGHTS, 2.0, eos_ids=(EOS,), pad_id=PAD, **fields)
    generate(tilted, PROMPTS, **options)
    assert tilted.num_checked > 20
    assert guide.num_kept > 10
    assert guide.num_from_start == len(PROMPTS), "a prompt is encoded once, however its rows are rearranged"


def test_the_next_batch_starts_from_scratch():
    """The same processor for several calls of generate, of different shapes or the same."""
    tilted = processor()
    for prompts in (PROMPTS, PROMPTS[:2], PROMPTS[2:4], PROMPTS):
        again = generate(tilted, prompts, do_sample=False)
        assert again.tolist() == generate(processor(), prompts, do_sample=False).tolist()


def test_rows_may_continue_in_any_way():
    """By a token that was not a candidate, in another order, duplicated, or after their end."""
    torch.manual_seed(0)
    tilted = processor(top_k=3)
    ids = torch.tensor([[PAD, 1, 5], [1, 6, 7]])
    scores = torch.randn(2, 97)
    out = tilted(ids, scores)
    candidate = int(out[1].argmax())
    stranger = next(token for token in range(3, 97) if out[1, token] == float("-inf"))
    for rows in (
        [[1, 6, 7, stranger], [PAD, 1, 5, 9], [1, 6, 7, candidate]],
        [[1, 6, 7, stranger, EOS], [1, 6, 7, stranger, EOS], [1, 6, 7, candidate, 40]],
        [[1, 6, 7, stranger, EOS, 50], [1, 6, 7, stranger, EOS, PAD], [1, 6, 7, candidate, 40, 41]],
    ):
        scores = torch.randn(3, 97)
        out = tilted(torch.tensor(rows), scores)
        for row, before, after in zip(rows, scores, out, strict=True):
            if row[-1] not in (EOS, PAD):
                expected = tilted_logprobs([token for token in row if token != PAD], before, top_k=3)
                torch.testing.assert_close(after.double(), expected, atol=1e-4, rtol=1e-4)


def test_finished_answers_are_not_scored():
    """Their distribution must still be valid: transformers draws a token for them and discards it."""
    guide = CountingGuide(MODELS)
    tilted = processor(guide)
    tilted(torch.tensor([[1, 5], [1, 6]]), torch.randn(2, 97))
    out = tilted(torch.tensor([[1, 5, EOS], [1, 6, 7]]), torch.randn(2, 97))
    assert len(guide.rows) == 1
    assert out.softmax(-1).sum(-1).tolist() == pytest.approx([1.0, 1.0])
    tilted(torch.tensor([[1, 5, EOS, PAD], [1, 6, 7, EOS]]), torch.randn(2, 97))
    assert guide.rows == set()


@pytest.mark.parametrize("fields", [{"weights": {"kind": 0.0}}, {"beta": 0.0}], ids=str)
def test_without_steering_it_is_the_truncated_base_model(fields):
    scores = torch.randn(2, 97)
    out = processor(top_k=5, **fields)(torch.tensor([[1, 5], [1, 6]]), scores)
    kept = scores >= scores.topk(5).values[:, -1:]
    expected = scores.masked_fill(~kept, float("-inf")).log_softmax(-1)
    torch.testing.assert_close(out, expected)


def test_a_value_that_is_not_a_number_is_an_error():
    """Also where the cap would hide it; the next batch is unaffected."""
    model = tiny_value(1)
    model.backbone.embed_tokens.weight[90] = float("nan")
    tilted = TiltProcessor(LocalGuide({"brief": model}), {"brief": 1.0}, tilt_cap=1.0, top_k=3, eos_ids=(EOS,))
    scores = -torch.arange(97.0)[None]
    with pytest.raises(ValueModelError, match="not finite"):
        tilted(torch.tensor([[1, 90]]), scores)
    assert tilted(torch.tensor([[1, 5]]), scores).isfinite().sum() == 3


def test_errors_name_their_argument():
    for fields in ({"beta": -1.0}, {"tilt_cap": 0.0}, {"top_k": 0}):
        with pytest.raises(RequestError) as caught:
            processor(**fields)
        assert caught.value.field in fields
    with pytest.raises(RequestError, match="wise"):
        processor(weights={"wise": 1.0})
