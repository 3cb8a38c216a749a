"""Serve the published value models of a run over HTTP until Ctrl-C or SIGTERM.

python -m jobs.serve --config jobs/configs/quickstart.yaml [dotted.key=value ...]

On any address but loopback it requires API keys: those in the file `serve.keys`, or else MAVIS_KEYS, or else keys.json
(see python -m jobs.keys). A relative path is below this checkout.
"""

from __future__ import annotations

import json
import shlex
import time
from contextlib import suppress

from jobs import arguments
from mavis_dist.config import Config
from mavis_dist.environment import key_file
from mavis_dist.types import Stopped

POLL_S = 0.2


def main() -> None:
    config = arguments.parse("serve", "Serve the published value models of a run over HTTP.")
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist import cluster
    from mavis_dist.models.load import load_tokenizer
    from mavis_dist.preflight.describe import lost_system
    from mavis_dist.progress import say
    from serve.app import deploy, undeploy

    config = with_keys(config)
    cluster.connect()
    with cluster.stop_on_signals(), suppress(Stopped):
        url = deploy(config)
        try:
            if lost := lost_system(config, load_tokenizer(config.base.model)):
                say("serve", lost)
            print(example(config, url), flush=True)
            while True:
                cluster.check_stop()
                time.sleep(POLL_S)
        finally:
            undeploy()


def with_keys(config: Config) -> Config:
    """The config with the key file of MAVIS_KEYS, unless it names one itself; raises UserError."""
    keys = config.serve.keys or key_file()
    return config.model_copy(update={"serve": config.serve.model_copy(update={"keys": keys})})


def example(config: Config, url: str) -> str:
    """The address and a request to try."""
    body = {
        "model": config.serve.served_model_name or config.base.model,
        "messages": [{"role": "user", "content": "How do I make good coffee?"}],
        "objective_weights": dict.fromkeys(config.objectives, round(1 / len(config.objectives), 2)),
        "seed": 1,
    }
    return (
        f"serving {config.run!r} at {url}/v1 (Ctrl-C ends it); try:\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}"
    )


if __name__ == "__main__":
    main()
