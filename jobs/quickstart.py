"""The whole system in one command: train, evaluate, report, serve, and send requests over HTTP.

    python -m jobs.quickstart --config jobs/configs/quickstart.yaml [dotted.key=value ...]

A second run skips what is finished.
"""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import Any

from jobs import arguments
from mavis_dist.config import Config

QUESTION = "I start a new job on Monday. Any advice?"
SEED = 7
LOOPBACK = "127.0.0.1"
COLUMN = 38  # characters


def main() -> None:
    config = arguments.parse(
        "quickstart", "Run the pipeline, serve the published value models, and send them a question."
    )
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist import cluster, pipeline
    from mavis_dist.evaluate.sweep import table
    from mavis_dist.plan import check_serving
    from mavis_dist.store import layout
    from mavis_dist.store.files import Store
    from serve.app import deploy, undeploy

    if cluster.is_local():  # a service that runs on a cluster has its port already
        cluster.check_port(LOOPBACK, config.serve.port)
    cluster.connect()
    check_serving(config, cluster.nodes())
    sweep = pipeline.run(config)
    print(f"\n{table(sweep)}\n")

    names = list(config.objectives)
    mixed = [{name: 1 / len(names) for name in names}] if len(names) > 1 else []
    weights = [{}, *({name: 1.0} for name in names), *mixed]
    # All requests come from this machine: on loopback no other can send any, and no key is needed.
    local = config.serve.model_copy(update={"host": LOOPBACK, "keys": None})
    with cluster.stop_on_signals():
        url = deploy(config.model_copy(update={"serve": local}))
        try:
            answers = [ask(url, config, w) for w in weights]
        finally:
            undeploy()
    print(f"The same question and seed over HTTP under {len(answers)} settings of objective_weights\n{QUESTION}\n")
    print(side_by_side([_describe(w) for w in weights], answers))
    root = Store(config.storage, config.run).root
    print(
        f"\nreport: {root}/{layout.REPORT_FILE}\n\nnext:\n"
        f"  make serve                       keep the endpoint running, then ask it with curl\n"
        f"  make quickstart CONFIG=my.yaml   your own objectives, prompts or model (see README)\n"
        f"  make test                        check this machine"
    )


def ask(url: str, config: Config, weights: dict[str, float]) -> str:
    """One answer from the running service, with its divergence."""
    import httpx

    body: dict[str, Any] = {
        "model": config.serve.served_model_name or config.base.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": config.rollout.max_tokens,
        "seed": SEED,
        "objective_weights": weights,
    }
    with httpx.Client(trust_env=False, timeout=120) as client:
        response = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    choice = response.json()["choices"][0]
    return f"{choice['message']['content']}\n[{choice['mavis']['divergence']:.1f} nats]"


def side_by_side(heads: list[str], texts: list[str]) -> str:
    """Texts as columns."""
    columns = [
        [head, "-" * (COLUMN - 2), *(line for part in text.splitlines() for line in textwrap.wrap(part, COLUMN - 2))]
        for head, text in zip(heads, texts, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("".join(cell.ljust(COLUMN) for cell in row).rstrip() for row in rows)


def _describe(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2g}" for name, weight in weights.items()) or "base (no weights)"


if __name__ == "__main__":
    main()
