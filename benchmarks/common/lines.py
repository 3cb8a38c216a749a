"""What a contender and the benchmark say to each other: one JSON object per line, over standard input and output.

A contender first names its variants and the version of its engine. Then it answers every request (variant, prompts as
token ids, number of new tokens of each, seed) with the number of tokens and the seconds that it took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

Decode = Callable[[list[list[int]], int, int], int]  # (prompts, tokens per answer, seed) -> tokens generated


def serve(package: str, load: Callable[[dict[str, Any]], Mapping[str, Decode]]) -> None:
    """Answer requests until standard input ends. `load` makes the variants from the options in the first argument."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    variants = load(json.loads(sys.argv[1]))
    print(
        json.dumps({"variants": [*variants], "version": f"{package} {metadata.version(package)}"}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        num_tokens = variants[request["variant"]](request["prompts"], request["tokens"], request["seed"])
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": num_tokens, "seconds": seconds}), file=answers, flush=True)
