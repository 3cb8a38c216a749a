"""Serve the published value models of a run over HTTP until Ctrl-C.

python -m jobs.serve --config jobs/configs/quickstart.yaml [dotted.key=value ...]

On another address than loopback it asks for API keys: those of MAVIS_KEYS, a file made by python -m jobs.keys.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress

from jobs import arguments
from mavis_dist.config import Config


def main() -> None:
    config = arguments.parse("serve", "Serve the published value models of a run over HTTP.")
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist import cluster
    from serve.app import deploy, undeploy

    cluster.connect()
    try:
        print(example(config, deploy(config, keys=os.environ.get("MAVIS_KEYS"))), flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        undeploy()


def example(config: Config, url: str) -> str:
    """The address and a request to try."""
    body = {
        "model": config.base.model,
        "messages": [{"role": "user", "content": "How do I make good coffee?"}],
        "objective_weights": dict.fromkeys(config.objectives, round(1 / len(config.objectives), 2)),
        "seed": 1,
    }
    return (
        f"serving {config.run!r} at {url}/v1 (Ctrl-C ends it); try:\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n  -d '{json.dumps(body)}'"
    )


if __name__ == "__main__":
    main()
