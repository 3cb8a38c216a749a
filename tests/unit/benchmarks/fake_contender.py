"""A contender that computes nothing: its variants are named after its settings, and `dies` ends it."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.common import lines


def load(options: dict[str, Any]) -> dict[str, lines.Decode]:
    print("a library greets")

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        time.sleep(0.01)
        return tokens * len(prompts)

    def die(prompts: list[list[int]], tokens: int, seed: int) -> int:
        sys.exit("out of luck")

    return {
        f"{options['name']} {os.environ.get('MY_SETTING')} {os.environ.get('OMP_WAIT_POLICY')}": decode,
        "dies": die,
    }


if __name__ == "__main__":
    lines.serve("numpy", load)
