"""One-time set-up, so that nothing has to be fetched or compiled later.

python -m jobs.prepare
"""

from __future__ import annotations

import sys

from jobs import arguments

MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")


def main() -> None:
    arguments.refusing(prepare)


def prepare() -> None:
    from mavis_dist.models.fetch import fetch
    from mavis_dist.train.engine import warm_up

    for name in MODELS:
        fetch(name)
    print("compiling DeepSpeed's communication operator (about 30 s, once)", file=sys.stderr)
    warm_up()


if __name__ == "__main__":
    main()
