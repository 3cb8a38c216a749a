"""The parts of the measurement."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import psutil

from benchmarks.common import contender, peers
from benchmarks.common.command import say
from benchmarks.common.contender import Program
from benchmarks.common.interleave import in_turn, ratio
from benchmarks.vllm.contenders import BETA, CAP, MAX_ROWS, NUM_PROMPTS, THREADS, Work, ask_engine, ask_vllm
from benchmarks.vllm.laws import largest_difference, seen_steps, steerer_of

COUNTS = (1, 4, 16, 32)
TOKENS, REPETITIONS = 64, 5
STEPS_CHECKED = 400
BLOCK, CACHE_BLOCKS = 32, 260  # tokens of vLLM's blocks under mixed load, and how many: for 32 rows, just about
PARTS = 10  # of the time under load


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
    with seen_steps(llm) as steps:
        ask_vllm(llm, prompts[:8], weights, TOKENS, scorer="full")
    steps = steps[:STEPS_CHECKED]
    return {**found, "steps": len(steps), "largest_difference": largest_difference(engine, steps, BETA, CAP)}


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
    """Memory of the process under requests of all kinds that come, go, are preempted and aborted.

    vLLM's cache is so small that it has been filled within the first tenth of the time.
    """
    from vllm import SamplingParams as Params

    llm = work.vllm("bfloat16", is_steered=True, num_gpu_blocks_override=CACHE_BLOCKS, block_size=BLOCK)
    chance, process = random.Random(0), psutil.Process()
    engine, number = llm.llm_engine, 0
    names: list[str] = []
    started, memory = time.monotonic(), [list[float]() for _ in range(PARTS)]
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
        memory[int(PARTS * passed / (60 * minutes))].append(process.memory_info().rss / 2**20)
    engine.abort_request(names)
    ask_vllm(llm, work.prompts[:1], {}, 2)
    ask_vllm(llm, work.prompts[:1], {}, 2)
    return {
        "minutes": minutes,
        "requests": number,
        "cache_tokens": CACHE_BLOCKS * BLOCK,
        "mib": [statistics.median(part) for part in memory if part],
        "rows_left": sum(len(trunk.slots._rows) for trunk in steerer_of(llm)._guide._trunks),
    }
