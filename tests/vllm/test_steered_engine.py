"""vLLM's engine draws what this project's engine draws, whatever vLLM does with its batch."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.vllm.laws import largest_difference, seen_steps, steerer_of
from tests.tiny import ALPHABET, EOS
from tests.vllm.conftest import BETA, CAP, expected, generate, seeded_by_vllm, steered

VOCABULARY = len(ALPHABET) + 2
CHANCE = random.Random(0)
PROMPTS = [[0, *CHANCE.choices(range(2, VOCABULARY), k=CHANCE.randint(2, 30))] for _ in range(50)]
MIXED = [{"brief": 1}, {"positive": 1}, {"brief": 1, "positive": 2}, {"brief": 0.1, "positive": 0.9}]


def test_greedy_answers_are_those_of_this_engine(llm, engine):
    params = [steered(MIXED[i % 4], temperature=0.0) for i in range(len(PROMPTS))]
    answers = generate(llm, PROMPTS, params)
    assert answers == expected(engine, PROMPTS, params)
    assert answers != generate(llm, PROMPTS, [steered({"brief": 1}, temperature=0.0, beta=0.0)] * len(PROMPTS))


@pytest.mark.parametrize(
    "settings",
    [{}, {"guide_every": 3}, {"tilt_cap": None, "top_p": 0.9}, {"scorer": "full", "top_p": 0.7}, {"top_k": 5}],
    ids=str,
)
def test_drawn_answers_are_those_of_this_engine(llm, engine, settings):
    params = [steered(MIXED[i % 4], seed=i, **settings) for i in range(24)]
    assert generate(llm, PROMPTS[:24], params) == expected(engine, PROMPTS[:24], params)


def test_the_law_of_every_step_is_that_of_this_engine(llm, engine):
    """With the scorer `full`, from which vLLM samples."""
    with seen_steps(llm) as steps:
        generate(llm, PROMPTS[:8], [steered(MIXED[i % 4], seed=i, scorer="full", max_tokens=8) for i in range(8)])
    assert len(steps) > 20
    assert largest_difference(engine, steps, BETA, CAP) < 1e-4


def test_other_requests_of_a_batch_are_left_alone(llm, start):
    from vllm import SamplingParams as Params

    plain = [Params(max_tokens=12, seed=i, temperature=0.9) for i in range(8)]
    alone = generate(llm, PROMPTS[:8], plain)
    both = generate(llm, PROMPTS[:16], [*plain, *(steered(seed=i) for i in range(8))])
    assert both[:8] == alone
    unsteered = {"objective_weights": {"brief": 0.0}}
    assert (
        generate(
            llm, PROMPTS[:8], [Params(max_tokens=12, seed=i, temperature=0.9, extra_args=unsteered) for i in range(8)]
        )
        == alone
    )


def test_each_answer_of_several_has_its_own_noise(llm, engine):
    def several(params):
        [out] = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
        return [list(choice.token_ids) for choice in out.outputs]

    of_each = expected(engine, [PROMPTS[0]] * 3, [steered(seed=7 + i) for i in range(3)])
    assert several(seeded_by_vllm(7, n=3)) == of_each
    assert len(set(map(tuple, several(seeded_by_vllm(None, n=3))))) == 3
    assert len(set(map(tuple, generate(llm, [PROMPTS[0]] * 3, [seeded_by_vllm(None)] * 3)))) == 3


def test_stop_strings_end_answers(llm, engine, base):
    [whole] = generate(llm, PROMPTS[:1], [steered(seed=3)])
    text = base.tokenizer.decode(whole)
    [out] = llm.generate([{"prompt_token_ids": PROMPTS[0]}], steered(seed=3, stop=[text[4:6]]), use_tqdm=False)
    assert out.outputs[0].text == text[: text.index(text[4:6])]
    assert out.outputs[0].stop_reason == text[4:6]


def test_an_end_is_never_first_and_ends_the_answer(llm):
    answers = generate(llm, PROMPTS, [steered(seed=i, max_tokens=60) for i in range(len(PROMPTS))])
    assert any(answer[-1] == EOS for answer in answers)
    assert all(EOS not in answer[:-1] and answer[0] != EOS for answer in answers)


# --- what vLLM does with its batch ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cramped(start):
    """Prompts in parts, room for few of the rows: they are preempted and computed again.

    vLLM 0.32 for CPUs ends at a prompt in parts with a seed of vLLM's own; this project's does no harm.
    """
    return start(
        max_num_batched_tokens=32,
        max_num_seqs=16,
        num_gpu_blocks_override=14,
        block_size=32,
        enable_chunked_prefill=True,
        disable_log_stats=False,
    )


def test_preempted_answers_and_prompts_in_parts_stay_the_same(cramped, engine):
    long = [[0, *CHANCE.choices(range(2, VOCABULARY), k=60)] for _ in range(24)]
    params = [steered(MIXED[i % 4], seed=i, max_tokens=60) for i in range(24)]
    before = num_preemptions(cramped)
    answers = generate(cramped, long, params)
    assert num_preemptions(cramped) > before
    assert answers == expected(engine, long, params)


def num_preemptions(llm):
    [metric] = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return metric.value


def test_cached_prefixes_change_nothing(cramped, engine):
    shared = [0, *CHANCE.choices(range(2, VOCABULARY), k=40)]
    prompts = [[*shared, 5 + i] for i in range(6)]
    params = [steered(seed=i) for i in range(6)]
    first, again = generate(cramped, prompts, params), generate(cramped, prompts, params)
    assert first == again == expected(engine, prompts, params)


def test_nothing_is_followed_after_the_answers(llm):
    generate(llm, PROMPTS, [steered(seed=i) for i in range(len(PROMPTS))])
    core, params = llm.llm_engine, steered(seed=1, max_tokens=200, min_tokens=150)
    for i in range(3):
        core.add_request(f"aborted-{i}", {"prompt_token_ids": PROMPTS[i]}, params)
    for _ in range(5):
        core.step()
    core.abort_request([f"aborted-{i}" for i in range(3)])
    generate(llm, PROMPTS[:1], [steered(max_tokens=2)])
    generate(llm, PROMPTS[:1], [steered(beta=0.0, max_tokens=2)])  # the batch changes once more
    trunks = steerer_of(llm)._guide._trunks
    assert [trunk.slots.num_tokens for trunk in trunks] == [0, 0]


def test_an_answer_whose_value_models_fail_ends_and_says_so(llm, engine, monkeypatch):
    guide = steerer_of(llm)._guide
    score = guide.score

    def broken(rows, counts, candidates_N):
        values_NM = score(rows, counts, candidates_N)
        is_last = torch.tensor([row == max(rows) for row in rows]).repeat_interleave(torch.tensor(counts))
        return torch.where(is_last[:, None], float("nan"), values_NM) if len(rows) == 3 else values_NM

    with monkeypatch.context() as patch:
        patch.setattr(guide, "score", broken)
        params = [steered(seed=i) for i in range(3)]
        outs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS[:3]], params, use_tqdm=False)
    sound = expected(engine, PROMPTS[:2], params[:2])
    assert [list(out.outputs[0].token_ids) for out in outs[:2]] == sound
    assert (outs[2].outputs[0].finish_reason, outs[2].outputs[0].stop_reason) == ("stop", 0)
    assert generate(llm, PROMPTS[:2], params[:2]) == sound
