"""The decoder on the real SmolLM2-135M: what holds for tiny models holds there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer, TiltProcessor
from mavis_dist.models.fetch import fetch
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.models.value import ValueModel, from_base
from mavis_dist.prompts import load_prompts
from mavis_dist.sections import Prompts

pytestmark = pytest.mark.real_model

NAME = "smollm2-135m-instruct"
QUESTIONS = ["What is a rainbow?", "I lost my keys again and I am so tired.", "Name three uses of vinegar.", "Hi!"]
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(NAME)


@pytest.fixture(scope="module")
def values() -> dict[str, ValueModel]:
    """Two truncated base models with random heads: large, arbitrary values."""
    models = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = from_base(fetch(NAME), layers=2)
        torch.nn.init.normal_(model.heads.weight, std=0.02)
        models[name] = model.eval().requires_grad_(False)
    return models


def prompts(base: BaseModel, questions: Sequence[str] = QUESTIONS) -> list[tuple[int, ...]]:
    system = "You are a helpful assistant."
    return [base.chat(q, system) for q in questions]


def builtin(count: int) -> list[str]:
    return [prompt.text for prompt in load_prompts(Prompts(train=count, validation=0), seed=0)[0]]


def generated(base: BaseModel, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """What transformers writes, all prompts in one batch."""
    pad, longest = base.eos_ids[0], max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = base.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=pad,
    )
    answers = []
    for tokens in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(tokens) if token in base.eos_ids), len(tokens))
        answers.append(tokens[:end])
    return answers


def test_greedy_decoding_is_that_of_transformers(base: BaseModel) -> None:
    """Fifty questions, 16 rows at a time, with a long common beginning; not one token differs."""
    params = SamplingParams(max_tokens=8, temperature=0)
    questions = prompts(base, builtin(50))
    requests = [Request(str(i), prompt, params=params) for i, prompt in enumerate(questions)]
    ours = [choice.tokens for [choice] in Engine(base, max_rows=16).generate(requests)]
    assert ours == generated(base, questions, 8)


def test_lazy_writes_what_full_writes_on_real_logits(base: BaseModel, values: dict[str, ValueModel]) -> None:
    """From far fewer candidates."""
    full = [
        Request(
            str(i),
            prompt,
            {"a": 1.0},
            beta=3.0,
            tilt_cap=2.5,
            scorer=Scorer.FULL,
            params=SamplingParams(max_tokens=16, seed=i, temperature=[1.0, 0.0, 0.7][i % 3]),
        )
        for i, prompt in enumerate(prompts(base, builtin(8)))
    ]
    lazy = [replace(request, scorer=Scorer.LAZY) for request in full]
    ours, theirs = (Engine(base, LocalGuide(values)).generate(requests) for requests in (lazy, full))
    assert [choice.tokens for [choice] in ours] == [choice.tokens for [choice] in theirs]
    num_lazy, num_full = (sum(sum(choice.num_scored) for [choice] in answers) for answers in (ours, theirs))
    assert num_lazy < 0.7 * num_full


def test_a_guided_batch_is_its_requests_one_by_one(base: BaseModel, values: dict[str, ValueModel]) -> None:
    weights = [{}, {"a": 1.0}, {"a": 0.3, "b": 0.7}, {"b": 1.0}]
    requests = [
        Request(str(i), prompt, weights=w, beta=3.0, params=SamplingParams(max_tokens=MAX_TOKENS, seed=i))
        for i, (prompt, w) in enumerate(zip(prompts(base), weights, strict=True))
    ]
    together = Engine(base, LocalGuide(values)).generate(requests)
    alone = [Engine(base, LocalGuide(values)).generate([request])[0] for request in requests]
    assert [c[0].tokens for c in together] == [c[0].tokens for c in alone]
    assert all(c[0].divergence > 1.0 for c in together[1:]), "the values steer"


def test_no_weight_and_no_strength_are_the_base_model(base: BaseModel, values: dict[str, ValueModel]) -> None:
    prompt, params = prompts(base)[0], SamplingParams(max_tokens=MAX_TOKENS, seed=5)
    [[plain]] = Engine(base).generate([Request("0", prompt, params=params)])
    for weights, beta in (({"a": 0.0, "b": 0.0}, 3.0), ({"a": 1.0}, 0.0)):
        [[choice]] = Engine(base, LocalGuide(values)).generate(
            [Request("0", prompt, weights=weights, beta=beta, params=params)]
        )
        assert choice.tokens == plain.tokens
        assert choice.divergence == 0.0
        assert choice.num_scored == []


def test_greedy_generation_with_the_processor_is_the_engine(base: BaseModel, values: dict[str, ValueModel]) -> None:
    """In one left-padded batch; the model's pad token is the one that ends its turns."""
    asked, weights = prompts(base)[:2], {"a": 0.3, "b": 0.7}
    params = SamplingParams(max_tokens=12, temperature=0)
    requests = [Request(str(i), prompt, weights=weights, beta=3.0, params=params) for i, prompt in enumerate(asked)]
    ours = [choices[0].tokens for choices in Engine(base, LocalGuide(values)).generate(requests)]
    assert ours != [choices[0].tokens for choices in Engine(base).generate([replace(r, weights={}) for r in requests])]
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer.pad({"input_ids": [list(prompt) for prompt in asked]}, return_tensors="pt")
    pad_id = base.tokenizer.pad_token_id
    processor = TiltProcessor(LocalGuide(values), weights, 3.0, eos_ids=base.eos_ids, pad_id=pad_id)
    theirs = base.model.generate(  # type: ignore[operator]
        **batch,
        logits_processor=[processor],
        max_new_tokens=12,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=pad_id,
    )
    answers = theirs[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: len(tokens)] for row, tokens in zip(answers, ours, strict=True)] == ours
