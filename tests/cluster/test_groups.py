"""A base model that several processes share: the same trees and answers as from one process, also when one dies."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from benchmarks.common.service import free_port
from mavis_dist import LLM, config
from mavis_dist.config import Config
from mavis_dist.groups import Alike, LeaderStarter, rollout_group
from mavis_dist.models import value
from mavis_dist.models.load import fingerprints
from mavis_dist.models.lockstep import GroupLost
from mavis_dist.rollout.worker import Grow
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Policy, Prompt, UserError
from tests.growing import grow
from tests.streams import strike_during
from tests.tiny import MODEL, write_base, write_run

pytestmark = pytest.mark.usefixtures("ray_address")

PROMPTS = [Prompt(id=f"p{n}", text=f"Tell me about the number {n}.") for n in range(4)]
POLICIES = [Policy(), Policy("brief", 1)]


def settings(folder: Path, size: int) -> Config:
    return config.parse(
        {
            "run": "run",
            "storage": str(folder / "runs"),
            "objectives": {"brief": {"reward": "brevity"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32", "tensor_parallel": size},
            "rollout": {
                "first": {"root": 2, "children": 2, "layers": 2},
                "max_tokens": 16,
                "cpus_per_actor": 0.5,
                "rows": 8,
            },
        }
    )


def followers() -> list[psutil.Process]:
    """Processes of groups, other than their leaders."""
    return [one for one in psutil.process_iter(["cmdline"]) if "Follower" in "".join(one.info["cmdline"] or [])]


def kill_the_follower() -> None:
    [follower] = followers()
    follower.kill()


def stop_the_follower() -> None:
    [follower] = followers()
    follower.send_signal(signal.SIGSTOP)


def wait_until_gone(limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while followers():
        assert time.monotonic() < deadline, "processes of a group outlive it"
        time.sleep(0.1)


def test_a_group_grows_the_trees_of_one_process_also_when_a_member_dies(tmp_path: Path) -> None:
    write_run(tmp_path, "run", ("brief",), eos_weight=1.0)
    batches = [[Grow(policy, prompt) for prompt in PROMPTS] for policy in POLICIES]
    alone, together = (grow(settings(tmp_path, size), batches) for size in (1, 2))
    struck = grow(settings(tmp_path, 2), batches, kill_the_follower)
    expected = {(policy, prompt.id) for policy in POLICIES for prompt in PROMPTS}
    assert alone.keys() == together.keys() == struck.keys() == expected
    for key, tree in alone.items():
        assert tree.tokens.tolist() == together[key].tokens.tolist() == struck[key].tokens.tolist()
    wait_until_gone()


@pytest.mark.long
def test_a_member_that_hangs_is_replaced_and_the_trees_are_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, "run", ("brief",), eos_weight=1.0)
    batches = [[Grow(policy, prompt) for prompt in PROMPTS] for policy in POLICIES]
    alone, struck = grow(settings(tmp_path, 1), batches), grow(settings(tmp_path, 2), batches, stop_the_follower)
    assert alone.keys() == struck.keys()
    for key, tree in alone.items():
        assert tree.tokens.tolist() == struck[key].tokens.tolist()
    wait_until_gone()


def test_an_actor_with_another_model_than_the_drivers_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "run", ("brief",), eos_weight=1.0)
    config = settings(tmp_path, 1)
    fingerprints(config.base.model)  # the driver's
    write_base(tmp_path, eos_weight=2.0)
    with pytest.raises(UserError, match=r"^the fingerprint of base.model is .* make them the same$"):
        grow(config, [[Grow(Policy(), prompt) for prompt in PROMPTS]])


@ray.remote(num_cpus=0)
class Leading:
    """A leader that does nothing but ask its followers."""

    def __init__(self, config: Config, driver: Alike):
        self._group = rollout_group(config, driver)

    def check(self) -> str:
        try:
            asyncio.run(self._group.check())
        except GroupLost as error:
            return str(error)
        return ""

    def value_parameters(self, folder: Path) -> int:
        """How many parameters of a value model's backbone this process holds."""
        model, _ = value.load(folder, base=self._group.base)
        parts = [one.to_local() if hasattr(one, "to_local") else one for one in model.backbone.parameters()]
        return sum(part.numel() for part in parts)


def test_value_models_as_large_as_the_base_model_are_shared_out_and_a_member_that_hangs_is_noticed(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, "run", ("brief",))
    folder = values.fetch(Store(str(run.parent), run.name), "brief", 0)
    whole = sum(one.numel() for one in value.load(folder)[0].backbone.parameters())
    starter = LeaderStarter(Leading, settings(tmp_path, 2))
    leader = starter.start()
    try:
        for _ in range(2):  # the first one's parts have been freed
            assert ray.get(leader.value_parameters.remote(folder)) < 0.52 * whole
        (folder / "torn").write_bytes(b"torn")
        (folder / "torn").replace(folder / "model.safetensors")  # whose pages are still in use
        with pytest.raises(value.ValueModelError, match="cannot be read"):
            ray.get(leader.value_parameters.remote(folder))
        assert ray.get(leader.check.remote()) == ""
        stop_the_follower()
        assert "does not answer" in ray.get(leader.check.remote())
    finally:
        starter.stop(leader)
        for follower in followers():
            follower.send_signal(signal.SIGCONT)
    wait_until_gone()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of a service whose only base replica is a group, and the folder of its run."""
    from serve.app import deploy, undeploy

    run = write_run(tmp_path, "run", ("brief",))
    serve = {"port": free_port(), "placement": "colocated", "cpus_per_replica": 0.1, "max_tokens": 200}
    shared = settings(tmp_path, 2).model_dump(mode="json")
    shared |= {"serve": serve, "steer": {"beta": 2.0, "tilt_cap": 2.5}}  # as `write_run` has it
    yield deploy(config.parse(shared), limit_s=180), run
    undeploy()


@pytest.mark.long
def test_a_service_on_a_group_answers_as_one_process_and_survives_a_member(served: tuple[str, Path]) -> None:
    url, run = served
    question = {
        "model": str(run.parents[1] / MODEL),
        "temperature": 0,
        "max_tokens": 120,
        "objective_weights": {"brief": 1},
    }
    question["messages"] = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Tell me more"}]
    expected = LLM.from_run(run).chat(question["messages"], weights={"brief": 1.0}, temperature=0.0, max_tokens=120)
    with httpx.Client(timeout=120, trust_env=False) as http:
        body = http.post(f"{url}/v1/chat/completions", json=question).json()
        assert body["choices"][0]["message"]["content"] == expected.text
        answer = strike_during(http, url, question, lambda: followers()[0].kill())
        assert answer["text"] == expected.text
