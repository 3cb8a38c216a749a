"""The parts of the measurement."""

from __future__ import annotations

import math
import random
import statistics
import time
from typing import Any

import psutil

from benchmarks.common import contender, peers
from benchmarks.common.command import say
from benchmarks.common.contender import Program
from benchmarks.common.interleave import in_turn, ratio
from benchmarks.vllm.contenders import BETA, MAX_ROWS, NUM_PROMPTS, THREADS, Work, ask_engine, ask_vllm
from mavis_dist.decode import Request, SamplingParams, Scorer

COUNTS = (1, 4, 16, 32)
TOKENS, REPETITIONS = 64, 5
STEPS_CHECKED = 400


def answers(work: Work) -> dict[str, Any]:
    """Answers and probabilities of vLLM with steering beside those of the built-in engine, in float32."""
    llm, engine, weights = work.vllm("float32", is_steered=True), work.engine("float32"), work.weights
    prompts = work.prompts[:NUM_PROMPTS]
    found: dict[str, Any] = {"tokens": TOKENS}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        ours = ask_vllm(llm, prompts, weights, TOKENS, temperature)
        theirs = ask_engine(engine, prompts, weights, TOKENS, temperature)
        found |= {name: len(ours), f"{name}_equal": sum(map(list.__eq__, ours, theirs))}
        say(str(found))
    seen: list[tuple[list[int], list[int], Any]] = []
    steerer = steerer_of(llm)
    steer = steerer.steer

    def spied(rows: Any, logits_BV: Any) -> None:
        contexts = [(list(row.request.prompt), list(row.generated)) for row in rows]
        steer(rows, logits_BV)
        seen.extend((*context, law_V) for context, law_V in zip(contexts, logits_BV.double().softmax(-1), strict=True))

    steerer.steer = spied
    ask_vllm(llm, prompts[:8], weights, TOKENS, scorer="full")
    steerer.steer = steer
    seen = seen[:STEPS_CHECKED]
    requests = [
        Request(
            str(i),
            tuple(prompt),
            weights,
            BETA,
            3.0,
            SamplingParams(len(answer) + 1, seed=0),
            tuple(answer),
            scorer=Scorer.FULL,
            top_logprobs=40,
        )
        for i, (prompt, answer, _) in enumerate(seen)
    ]
    largest = 0.0
    for [choice], (_, _, law_V) in zip(engine.generate(requests), seen, strict=True):
        left_V = law_V.clone()
        for candidate in choice.logprobs[0].top:
            left_V[candidate.token] -= math.exp(candidate.logprob)
        largest = max(largest, float(left_V.abs().max()))
    return {**found, "steps": len(seen), "largest_difference": largest}


def speed(work: Work, is_quick: bool) -> dict[str, Any]:
    """Tokens per second of all engines, plain and steered, by the number of requests.

    Each engine has a process of its own, which stands still while another one is measured.
    """
    repetitions, found = (2 if is_quick else REPETITIONS), dict[str, dict[str, list[float]]]()
    options = {"model": work.model, "folders": {name: str(folder) for name, folder in work.folders.items()}}
    vllm = peers.vllm_settings(THREADS)["vllm_all_cores"]

    def program(name: str, settings: dict[str, str], is_compiled: bool = False) -> Program:
        return Program("benchmarks.vllm.contenders", {**options, "name": name, "is_compiled": is_compiled}, settings)

    programs = {
        "built_in": program("built_in", {}),
        "vllm": program("vllm", vllm),
        "compiled": program("compiled", vllm, is_compiled=True),
        "rows": program("rows", {}),
    }
    with contender.start(programs) as started:
        variants = {variant: one for one in started for variant in one.variants}
        for count in COUNTS:
            prompts = [work.prompts[i % len(work.prompts)] for i in range(count)]
            for variant, one in variants.items():
                one.tokens_per_s(variant, prompts, TOKENS, 0)  # warm-up
            for repetition, variant in in_turn(list(variants), repetitions):
                per_s = variants[variant].tokens_per_s(variant, prompts, TOKENS, repetition)
                found.setdefault(variant, {}).setdefault(str(count), []).append(per_s)
            say(
                f"{count} requests: "
                + ", ".join(f"{n} {statistics.median(s[str(count)]):.0f}" for n, s in found.items())
            )
    medians = {name: {count: statistics.median(s) for count, s in by.items()} for name, by in found.items()}
    with_processor = {
        name: ratio(found[f"{name} plain, with the processor"]["16"], found[f"{name} plain"]["16"])
        for name in ("vllm", "compiled")
    }
    return {
        "tokens": TOKENS,
        "repetitions": repetitions,
        "beta": BETA,
        "tokens_per_s": medians,
        "plain_with_processor": with_processor,
    }


def load(work: Work, minutes: float) -> dict[str, Any]:
    """Memory of the process under requests of all kinds that come, go and are aborted."""
    from vllm import SamplingParams as Params

    llm, chance, process = work.vllm("bfloat16", is_steered=True), random.Random(0), psutil.Process()
    engine, number = llm.llm_engine, 0
    names: list[str] = []
    started, memory = time.monotonic(), []
    while (passed := time.monotonic() - started) < 60 * minutes:
        while len(names) < MAX_ROWS and chance.random() < 0.7:
            weight = chance.random()
            weights = dict(zip(work.objectives, (weight, 1 - weight), strict=True))
            steering = {"objective_weights": weights, "scorer": chance.choice(("lazy", "full"))}
            params = Params(
                max_tokens=chance.randint(1, 200),
                n=chance.choice((1, 1, 1, 3)),
                top_p=chance.choice((1.0, 0.9)),
                extra_args=steering if chance.random() < 0.7 else None,
            )
            names.append(str(number))
            engine.add_request(names[-1], {"prompt_token_ids": list(chance.choice(work.prompts))}, params)
            number += 1
        finished = {out.request_id for out in engine.step() if out.finished}
        if names and chance.random() < 0.05:
            aborted = chance.choice(names)
            engine.abort_request([aborted])
            finished.add(aborted)
        names = [name for name in names if name not in finished]
        memory.append((passed, process.memory_info().rss / 2**20))
    engine.abort_request(names)
    ask_vllm(llm, work.prompts[:1], {}, 2)
    ask_vllm(llm, work.prompts[:1], {}, 2)
    guide = steerer_of(llm)._guide
    first = [mib for at, mib in memory if at < 6 * minutes]
    last = [mib for at, mib in memory if at > 54 * minutes]
    return {
        "minutes": minutes,
        "requests": number,
        "mib_first": statistics.median(first[len(first) // 2 :]),
        "mib_last": statistics.median(last),
        "rows_left": sum(len(trunk.slots._rows) for trunk in guide._trunks),
    }


def steerer_of(llm: Any) -> Any:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    processors = runner.input_batch.logitsprocs.non_argmax_invariant
    [steering] = [one for one in processors if type(one).__name__ == "Steering"]
    return steering._steerer
