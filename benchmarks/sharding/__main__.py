"""A base model that several processes share, beside the same model in one: answers, trees, memory, and a death.

    python -m benchmarks.sharding --config jobs/configs/quickstart.yaml [--size N] [--json FILE]

The config's run must be finished: the service that loses a process steers by its value models. In float32, so that
greedy answers and trees have to be the same to the last token. Memory is measured in bfloat16, too: there all weights
are copies, while in the type of their file some may stay pages of it, which do not count. Writes
docs/figures/sharding.json and its part of docs/clusters.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures
from benchmarks.common.command import say
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table, write_part
from mavis_dist.config import Config

if TYPE_CHECKING:
    from benchmarks.sharding.member import Count, Memory

NAME = "sharding"
PAGE = figures.DOCS / "clusters.md"
GREEDY, TREES = 50, 8
LIMIT_S = 1800.0
COPIED = "bfloat16"  # a type that weight files in float32 or float16 do not have


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description="Measure a shared base model.")
    command.add_config(parser, "jobs.pipeline")
    parser.add_argument("--size", type=int, default=3, help="processes that share the model (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=GREEDY, help="greedy answers (default: %(default)s)")
    parser.add_argument("--trees", type=int, default=TREES, help="trees of the base policy (default: %(default)s)")
    command.add_json(parser, NAME)
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)

    def measure(config: Config) -> dict[str, Any]:
        from benchmarks.sharding import service
        from benchmarks.sharding.member import Count

        return {
            **compare(config, arguments.size, Count(arguments.prompts, arguments.trees)),
            **service.measure(config, arguments.size),
        }

    found = command.of_config(parser, arguments, command.file_of(NAME, arguments), measure, argv)
    write_part(PAGE, NAME, render(found))


def compare(config: Config, size: int, count: Count) -> dict[str, Any]:
    """Answers, trees, speed and memory of a group beside those of one process."""
    base = config.base.model_copy(update={"dtype": "float32", "tensor_parallel": size})
    config = config.model_copy(update={"base": base})
    alone, whole = group(config, 1, count)
    together, parts = group(config, size, count)
    as_copies = config.model_copy(update={"base": base.model_copy(update={"dtype": COPIED})})
    nothing = replace(count, greedy=0, trees=0)
    (_, whole_copied), (_, copied) = group(as_copies, 1, nothing), group(as_copies, size, nothing)
    found = {
        "size": size,
        "model": config.base.model,
        "greedy_answers": len(alone.greedy),
        "greedy_answers_equal": sum(map(list.__eq__, alone.greedy, together.greedy)),
        "trees": len(alone.trees),
        "trees_equal": sum(map(list.__eq__, alone.trees, together.trees)),
        "tokens_per_s": {"one process": alone.tokens_per_s, "group": together.tokens_per_s},
        "weights_mib": whole[0].weights,
        "memory_mib": [asdict(part) for part in parts],
        "copied_memory_mib": [asdict(part) for part in copied],
        "beyond_weights_mib": max(part.most - part.weights for part in copied),
        "beyond_weights_mib_of_one_process": whole_copied[0].most - whole_copied[0].weights,
    }
    say(str(found))
    return found


def group(config: Config, size: int, count: Count) -> tuple[Any, list[Memory]]:
    """What a group of processes has `Answered`, None if it is asked for nothing, and the memory of each."""
    from benchmarks.sharding import member

    context = multiprocessing.get_context("spawn")
    ports, results = context.Queue(), context.Queue()
    processes = [
        context.Process(target=member.run, args=(rank, size, ports, results, config, count)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=LIMIT_S) for _ in range(size + (count.greedy > 0))]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return found[size] if count.greedy else None, found[:size]


def render(found: Mapping[str, Any]) -> str:
    speeds, memory, lost = found["tokens_per_s"], found["memory_mib"], found["lost_process"]
    copied, alone = found["copied_memory_mib"], found["beyond_weights_mib_of_one_process"]
    rows = [
        ["the same greedy answers", f"{found['greedy_answers_equal']} of {found['greedy_answers']}"],
        ["the same trees", f"{found['trees_equal']} of {found['trees']}"],
        ["weights per process", f"{memory[0]['weights']:.0f} MiB of {found['weights_mib']:.0f}"],
        ["most memory that loading took", f"{max(part['most'] for part in memory):.0f} MiB"],
        [f"the same in {COPIED}", f"{max(part['most'] for part in copied):.0f} MiB for {copied[0]['weights']:.0f}"],
        ["beyond the weights", f"{found['beyond_weights_mib']:.0f} MiB, one process {alone:.0f}"],
        ["speed beside one process on one thread", f"{speeds['group'] / speeds['one process']:.2f}"],
        ["answer whose group loses a process", "same tokens" if lost["is_same"] else "other tokens"],
        ["longest wait in its stream", f"{lost['longest_wait_s']:.1f} s"],
    ]
    return (
        f"Measured by `{found['command']}` with {found['model']} in float32, {found['size']} processes of one thread. "
        f"{machine_line(found)}. Processes that share two cores show that results are right, not how fast it is. "
        "Memory is each process's own, beyond code and tokenizer; pages of the weight files, which all share, are left "
        f"out: in {COPIED} all weights are copies, so that none of them can be such pages. Aim: a quarter beyond the "
        "weights in float32.\n\n" + table(["", f"{found['size']} processes"], rows)
    )


if __name__ == "__main__":
    main()
