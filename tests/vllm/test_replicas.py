"""Actors and replicas whose base model vLLM computes, on real Ray: as with the built-in engine, also when one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray.util.state import list_actors

from benchmarks.common.service import free_port
from mavis_dist import LLM, config
from mavis_dist.config import Config
from mavis_dist.rollout.worker import Grow
from mavis_dist.types import Policy, Prompt
from tests.growing import grow
from tests.streams import kill_during, replica_pids, whole_text
from tests.vllm.conftest import BETA, CAP

pytestmark = pytest.mark.usefixtures("ray_address")

PROMPTS = [Prompt(id=f"p{n}", text=f"Tell me about the number {n}.") for n in range(8)]


def settings(run: Path, model: str, engine: str) -> Config:
    return config.parse(
        {
            "run": run.name,
            "storage": str(run.parent),
            "objectives": {name: {"reward": "brevity"} for name in ("brief", "positive")},
            "base": {"model": model, "dtype": "float32", "engine": engine},
            "rollout": {
                "first": {"root": 2, "children": 2, "layers": 2},
                "max_tokens": 16,
                "cpus_per_actor": 0.5,
                "rows": 8,
            },
            "steer": {"beta": BETA, "tilt_cap": CAP},
            "serve": {"port": free_port(), "base_replicas": 2, "rows": 4, "cpus_per_replica": 0.1, "max_tokens": 200},
        }
    )


def kill_the_actor() -> None:
    address = ray.get_runtime_context().gcs_address
    [actor] = list_actors(address, filters=[("class_name", "=", "Worker"), ("state", "=", "ALIVE")])
    os.kill(actor.pid, signal.SIGKILL)


def test_an_actor_grows_the_trees_of_the_built_in_engine_also_when_it_dies(run: Path, model: str) -> None:
    steered = Policy("brief", 1)
    batches = [[Grow(steered, prompt) for prompt in PROMPTS[n : n + 4]] for n in (0, 4)]
    expected = grow(settings(run, model, "builtin"), batches)
    struck = grow(settings(run, model, "vllm"), batches, kill_the_actor)
    assert struck.keys() == expected.keys() == {(steered, prompt.id) for prompt in PROMPTS}
    for key, tree in expected.items():
        assert struck[key].tokens.tolist() == tree.tokens.tolist()
        assert struck[key].token_logratio == pytest.approx(tree.token_logratio, abs=1e-4)


@pytest.fixture
def url(run: Path, model: str) -> Iterator[str]:
    from serve.app import deploy, undeploy

    yield deploy(settings(run, model, "vllm"), limit_s=300)
    undeploy()


def test_a_service_answers_as_the_built_in_engine_and_survives_a_replica(url: str, run: Path, model: str) -> None:
    messages = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Tell me more"}]
    weights = {"brief": 1.0, "positive": 0.5}
    asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 120, "objective_weights": weights}
    expected = LLM.from_run(run).chat(messages, weights=weights, temperature=0.0, max_tokens=120)
    with httpx.Client(timeout=120, trust_env=False) as http:
        answer = http.post(f"{url}/v1/chat/completions", json=asked).json()["choices"][0]
        assert answer["message"]["content"] == expected.text
        assert answer["mavis"]["divergence"] == pytest.approx(expected.divergence, abs=1e-3)
        refused = http.post(f"{url}/v1/chat/completions", json={**asked, "preferences": [{"text": "Be kind."}]})
        assert refused.status_code == 400
        assert "base.engine" in refused.json()["error"]["message"]

        victims = replica_pids("main", "Base")
        assert len(victims) == 2
        assert kill_during(http, url, asked, victims[:1])["text"] == expected.text
        assert kill_during(http, url, asked, victims[1:])["text"] == expected.text
        assert whole_text(http, url, asked) == expected.text
