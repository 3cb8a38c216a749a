"""A service whose machines join late and are drained: running streams go on, on other machines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from benchmarks.chaos.kills import texts
from benchmarks.chaos.stream_outcomes import StreamOutcome, count_outcomes, is_kept
from benchmarks.common.http_load import Body, Outcome, client_process, closed_loop
from benchmarks.common.nodes import drain, ray_nodes
from benchmarks.common.service import free_port
from jobs import scale
from serve.dashboard import Dashboard
from tests.cluster.jobs import start, url_of
from tests.tiny import MODEL, write_models

pytestmark = pytest.mark.long

NUM_CLIENTS, LIMIT_S = 2, 180.0


def test_a_service_moves_to_machines_that_join_from_machines_that_are_drained(tmp_path: Path) -> None:
    config, bodies = write_config(tmp_path)
    with ray_nodes(1, 1) as cluster, ExitStack() as stack:
        first = cluster.add_node(num_cpus=2)
        url = stack.enter_context(served(cluster, config))
        client = stack.enter_context(client_process())
        dashboard = f"http://{cluster.head_node.address_info['webui_url']}"
        expected = texts(closed_loop(client, url, bodies, NUM_CLIENTS).result().outcomes, len(bodies))

        with under_load(client, url, bodies) as outcomes, ThreadPoolExecutor(1) as pool:
            scaled = pool.submit(scale.run, dashboard, {"base": 2}, LIMIT_S)
            time.sleep(5.0)
            assert not scaled.done(), "there is no room for another replica yet"
            late = cluster.add_node(num_cpus=1)
            scaled.result()
            drain(cluster, late)
            cluster.add_node(num_cpus=1)
            scale.wait(Dashboard(dashboard), {"base": 2}, LIMIT_S)
        counts = count_outcomes(outcomes, expected)
        assert set(counts) == {StreamOutcome.WHOLE}, counts

        cluster.add_node(num_cpus=2)
        with under_load(client, url, bodies) as outcomes:
            drain(cluster, first)  # which may have the gateway, and with it the connections
            scale.wait(Dashboard(dashboard), {"base": 2, "brief": 1}, LIMIT_S)
        assert is_kept(count_outcomes(outcomes, expected))
        assert texts(closed_loop(client, url, bodies, NUM_CLIENTS).result().outcomes, len(bodies)) == expected


def write_config(folder: Path) -> tuple[Path, list[Body]]:
    """The config of a service whose three processes need a core each, and requests to it."""
    write_models(folder, "served", ("brief",))
    model = str(folder / MODEL)
    settings = {
        "run": "served",
        "storage": str(folder / "runs"),
        "objectives": {"brief": {"reward": "brevity"}},
        "base": {"model": model, "dtype": "float32"},
        "serve": {"port": free_port(), "cpus_per_replica": 1, "max_tokens": 300},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    body = {"model": model, "max_tokens": 300, "top_k": 20, "objective_weights": {"brief": 1.0}}
    return config, [
        {**body, "seed": seed, "messages": [{"role": "user", "content": f"Tell me more, number {seed}"}]}
        for seed in range(4)
    ]


@contextmanager
def served(cluster: Any, config: Path) -> Iterator[str]:
    """The URL of a service that a job serves until the end of the block."""
    job = start(config, cluster.address, job="serve")
    try:
        yield url_of(job)
    finally:
        job.terminate()
        job.communicate(timeout=LIMIT_S)


@contextmanager
def under_load(client: ProcessPoolExecutor, url: str, bodies: list[Body]) -> Iterator[list[Outcome]]:
    """All requests that are sent, one after the other by every client, until the end of the block."""
    outcomes, is_over = list[Outcome](), Event()

    def load() -> None:
        while not is_over.is_set():
            outcomes.extend(closed_loop(client, url, bodies, NUM_CLIENTS, timeout_s=60.0).result().outcomes)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load)
        try:
            yield outcomes
        finally:
            is_over.set()
            running.result()
