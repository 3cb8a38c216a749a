"""Model runner V2, which needs a GPU: its interface on stand-ins for its buffers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from mavis_dist.vllm import Steering
from tests.tiny import EOS
from tests.vllm.conftest import expected, steered
from tests.vllm.test_steered_engine import MIXED, PROMPTS

SLOTS, LENGTH = 6, 256


class Runner:
    """What V2 does around a processor: slots from a free list, rows in any order, prompts in parts."""

    def __init__(self, llm, base):
        self.base, config = base, llm.llm_engine.vllm_config
        tokens = torch.zeros(SLOTS, LENGTH, dtype=torch.int32)
        lengths = [SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)) for _ in range(2)]
        self.state = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=100,
            all_token_ids=SimpleNamespace(gpu=tokens),
            prompt_len=lengths[0],
            prefill_len=lengths[1],
            total_len=SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)),
        )
        config = SimpleNamespace(
            model_config=config.model_config, parallel_config=config.parallel_config, speculative_config=None
        )
        [self.processor] = build_custom_logits_processors(config, self.state, False, [Steering])
        self.free, self.running = list(range(SLOTS)), {}  # slot -> index

    def add(self, index, prompt, answer, params):
        slot = self.free.pop(0)
        tokens = [*prompt, *answer]
        self.state.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.state.prompt_len.np[slot], self.state.prefill_len.np[slot] = len(prompt), len(tokens)
        assert self.processor.add_request(slot, params)
        self.running[slot] = index

    def remove(self, slot):
        self.free.append(slot)
        del self.running[slot]

    def step(self, order, lengths):
        """The tokens that follow the first `lengths` tokens of slots, in the order of rows."""
        rows = [self.state.all_token_ids.gpu[slot, :length].long() for slot, length in zip(order, lengths, strict=True)]
        slots = torch.tensor(order)
        context = LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=np.array(order),
            expanded_local_pos=torch.zeros(len(order)),
            input_ids=torch.stack([row[-1] for row in rows]),
            pos=torch.tensor([len(row) - 1 for row in rows]),
            seq_lens_upper_bound_np=np.array(lengths),
        )
        logits = torch.stack([self.base.model(row[None]).logits[0, -1] for row in rows])
        return self.processor.apply(logits, context).argmax(-1).tolist()


@pytest.fixture
def runner(llm, base):
    return Runner(llm, base)


def test_answers_are_those_of_this_engine(runner, engine):
    prompts = PROMPTS[:14]
    params = [steered(MIXED[i % 4], seed=i, max_tokens=10) for i in range(14)]
    answers, waiting, chance = [[] for _ in prompts], list(range(14)), np.random.default_rng(0)
    while waiting or runner.running:
        while waiting and runner.free:
            index = waiting.pop(0)
            runner.add(index, prompts[index], answers[index], params[index])
        order = chance.permutation(list(runner.running)).tolist()
        parts, lengths = set(), []
        for slot in order:
            index = runner.running[slot]
            length = len(prompts[index]) + len(answers[index])
            if not answers[index] and chance.random() < 0.3 and length > 3:  # a part of its prompt
                parts.add(slot)
                length -= 2
            lengths.append(length)
        for slot, token in zip(order, runner.step(order, lengths), strict=True):
            if slot in parts:
                continue
            index = runner.running[slot]
            answers[index].append(token)
            length = len(prompts[index]) + len(answers[index])
            runner.state.all_token_ids.gpu[slot, length - 1] = token
            if token in (0, EOS) or len(answers[index]) == 10:
                runner.remove(slot)
            elif chance.random() < 0.1:  # preempted
                runner.remove(slot)
                waiting.append(index)
    assert answers == expected(engine, prompts, params)


def test_other_requests_and_bad_arguments(runner):
    from vllm import SamplingParams as Params

    assert not runner.processor.add_request(0, Params())
    validate = build_custom_logits_processors_params_validator([Steering])
    validate(Params())
    with pytest.raises(VLLMValidationError, match="there is no objective 'bref'; available: brief, positive"):
        validate(steered({"bref": 1}))
