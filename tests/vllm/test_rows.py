"""This project's engine with a base model that vLLM computes: the same answers, reports and trees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mavis_dist.core.tree import Shape
from mavis_dist.decode import Engine, LocalGuide, Preference, Request, RequestError, SamplingParams, Scorer, beam_search
from mavis_dist.decode.load_guide import fetch_published, load_models
from mavis_dist.llm import open_run
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.types import Policy, Prompt
from mavis_dist.vllm.rows import load_base
from tests.vllm.test_steered_engine import MIXED, PROMPTS

ROWS = 8


@pytest.fixture(scope="session")
def host(model, llm):
    return load_base(model, "float32", "cpu", ROWS)


@pytest.fixture(scope="module")
def models(run):
    _, store = open_run(run)
    return load_models(fetch_published(store))


@pytest.fixture
def engines(host, base, models):
    return Engine(host, LocalGuide(models), ROWS), Engine(base, LocalGuide(models), ROWS)


def requests(**fields):
    return [
        Request(
            str(i),
            tuple(PROMPTS[i]),
            MIXED[i % 4] if i % 5 else {},
            2.0,
            2.5,
            SamplingParams(20 + i, temperature=(1.0, 0.0, 0.7)[i % 3], seed=i, n=1 + i % 3, stop=("ab",)),
            scorer=(Scorer.LAZY, Scorer.FULL)[i % 2],
            **fields,
        )
        for i in range(20)
    ]


def test_answers_and_reports_are_those_of_the_built_in_engine(engines):
    ours, theirs = (engine.generate(requests(top_logprobs=3)) for engine in engines)
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert (a.tokens, a.finish, a.text) == (b.tokens, b.finish, b.text)
        assert a.logratios == pytest.approx(b.logratios, abs=1e-4)
        assert a.divergences == pytest.approx(b.divergences, abs=1e-4, nan_ok=True)
        assert a.values == {name: pytest.approx(values, abs=1e-4) for name, values in b.values.items()}
    assert engines[0].num_cached_tokens == 0


def test_answers_are_continued_and_cancelled(engines):
    ours, theirs = engines
    [[whole]] = theirs.generate([replace(requests()[0], params=SamplingParams(20, seed=3))])
    begun = replace(requests()[0], params=SamplingParams(20, seed=3), answer=tuple(whole.tokens[:7]))
    other = replace(requests()[4], id="other", params=SamplingParams(20, seed=3))
    ours.submit(begun)
    ours.submit(other)
    ours.step()
    ours.cancel("other")
    done = []
    while not ours.is_idle:
        done += [update.finished for update in ours.step() if update.finished]
    assert done[0].tokens == whole.tokens[7:]


def test_trees_are_those_of_the_built_in_engine(engines):
    def grown(engine, objective):
        policy = Policy(objective, 1) if objective else Policy()
        grower = TreeGrower(engine, Shape(3, 2, 3, 30), policy, Sampling(beta=2.0), 5)
        prompts = [Prompt(str(i), "") for i in range(6)]
        trees = grower.grow(prompts, PROMPTS[:6])
        return {tree.prompt_id: tree for tree in trees}

    for objective in (None, "brief"):
        ours, theirs = (grown(engine, objective) for engine in engines)
        for name, tree in theirs.items():
            assert list(ours[name].tokens) == list(tree.tokens)
            assert list(ours[name].token_logratio) == pytest.approx(list(tree.token_logratio), abs=1e-4)


def test_beams_are_those_of_the_built_in_engine(engines):
    asked = [Request(str(i), tuple(PROMPTS[i]), {"brief": 1}, 2.0, None, SamplingParams(8, seed=i)) for i in range(3)]
    ours, theirs = (beam_search(engine, asked, 3) for engine in engines)
    assert [[beam.tokens for beam in beams] for beams in ours] == [[beam.tokens for beam in beams] for beams in theirs]


def test_a_cache_that_is_too_small_costs_time_only(model, llm, base, models, monkeypatch):
    from mavis_dist.vllm import interrupt

    arguments = interrupt.EngineArgs
    monkeypatch.setattr(
        interrupt, "EngineArgs", lambda **given: arguments(**given, num_gpu_blocks_override=34, block_size=32)
    )
    cramped = Engine(load_base(model, "float32", "cpu", 16), LocalGuide(models), 16)
    asked = [Request(str(i), tuple(PROMPTS[i]), MIXED[i % 4], 2.0, 2.5, SamplingParams(100, seed=i)) for i in range(16)]
    ours, theirs = cramped.generate(asked), Engine(base, LocalGuide(models), 16).generate(asked)
    assert [choices[0].tokens for choices in ours] == [choices[0].tokens for choices in theirs]


def test_sentences_are_refused(engines):
    asked = Request("1", tuple(PROMPTS[0]), preferences=(Preference("Be kind.", (1, 2, 3)),))
    with pytest.raises(RequestError, match=r"preferences: this engine's base model cannot read them: use base.engine"):
        engines[0].submit(asked)
