"""One-time set-up: fetch the models and compile what is in C++, so that no later command has to.

python -m jobs.prepare

Where the extra [train] is not installed, only what serving needs is prepared.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from jobs import arguments

BASE_MODEL, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"


def main() -> None:
    arguments.refusing(prepare)


def prepare() -> None:
    from mavis_dist.models.fetch import fetch
    from mavis_dist.native import build

    fetch(BASE_MODEL)
    build.is_loaded()
    if find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: this machine can serve, but not train", file=sys.stderr)
        return
    from mavis_dist.train.engine import warm_up

    fetch(EMBEDDER)
    if build.has_compiler():
        print("compiling DeepSpeed's communication operator (about 30 s, once)", file=sys.stderr)
        warm_up()


if __name__ == "__main__":
    main()
