"""What a config would use, and whether anything in it fails: without a cluster, a GPU, or weights in memory but
those of rewards.

python -m jobs.check --config jobs/configs/quickstart.yaml [dotted.key=value ...]

The first problem ends it with one line and exit code 2. A run tries the same before it starts, and on every machine.
"""

from __future__ import annotations

from jobs import arguments
from mavis_dist.config import Config

WIDTH = 14  # of the topics


def main() -> None:
    config = arguments.parse("check", "Print what a config would use, and the first problem in it.")
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist.preflight.checks import check
    from mavis_dist.run_state import check_same_run
    from mavis_dist.store.files import Store

    store = Store(config.storage, config.run)
    check_same_run(store, config)
    store.check_writable()
    tell("storage", store.root)
    check(config, tell)


def tell(topic: str, text: str) -> None:
    print(f"{topic.ljust(WIDTH)} {text}", flush=True)


if __name__ == "__main__":
    main()
