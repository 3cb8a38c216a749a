"""Deploys the service of a run and keeps it up until Ctrl-C.

python -m serve.run --config jobs/configs/quickstart.yaml [dotted.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.types import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.run",
        description="Serve the published value models of a run over HTTP.",
        epilog=f"config keys:\n{config_module.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    try:
        run(config_module.load(arguments.config, arguments.overrides))
    except UserError as error:
        _fail(error)


def run(config: Config) -> None:
    """Connect, deploy, say how to ask, and wait; everything ends with Ctrl-C."""
    from mavis_dist import cluster
    from serve.app import deploy, undeploy

    cluster.connect()
    try:
        print(example(config, deploy(config)), flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        undeploy()


def example(config: Config, url: str) -> str:
    """The address and a request to try."""
    share = round(1 / len(config.objectives), 2)
    body = {
        "model": config.base.model,
        "messages": [{"role": "user", "content": "How do I make good coffee?"}],
        "objective_weights": dict.fromkeys(config.objectives, share),
        "seed": 1,
    }
    return (
        f"serving {config.run!r} at {url}/v1 (Ctrl-C ends it); try:\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n  -d '{json.dumps(body)}'"
    )


def _fail(error: Exception) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
