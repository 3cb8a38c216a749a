"""Publishing value models and adding objectives does not disturb running streams."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray import serve

from mavis_dist.config import Config
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.models.load import chat_ids, load_base
from mavis_dist.store import values
from mavis_dist.store.files import Store
from serve.app import deploy_objective
from serve.settings import value_application
from tests.serving.conftest import RUN
from tests.streams import LONG, replica_pids, whole_text
from tests.tiny import publish_next


@pytest.fixture
def body(served_config) -> dict:
    return {**LONG, "model": served_config.base.model, "seed": 5}


@pytest.fixture
def store(served_config: Config) -> Iterator[Store]:
    """The run that is served; restored afterwards."""
    store = Store(served_config.storage, served_config.run)
    yield store
    values.publish(store, "positive", 0)
    store.delete("values/kind")
    if value_application("kind") in serve.status().applications:
        serve.delete(value_application("kind"))
    time.sleep(3)  # until the gateway has read it


def publish(config: Config, objective: str, iteration: int, seed: int) -> None:
    publish_next(Path(config.storage).parent, RUN, objective, iteration, seed)


def versions(http: httpx.Client, url: str) -> dict[str, str]:
    return {o["id"]: o["version"] for o in http.get(f"{url}/v1/objectives").json()["data"]}


def wait_for(http: httpx.Client, url: str, objective: str, version: str) -> None:
    deadline = time.monotonic() + 10
    while versions(http, url).get(objective) != version:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def in_process(config: Config, store: Store, body: dict) -> str:
    """The engine's answer with the currently published models."""
    base = load_base(config.base.model)
    prompt = tuple(chat_ids(base.tokenizer, body["messages"], config.base.system))
    params = SamplingParams(body["max_tokens"], top_k=body["top_k"], seed=body["seed"])
    request = Request("r", prompt, body["objective_weights"], beta=config.steer.beta, params=params)
    [[choice]] = Engine(base, load_guide(fetch_published(store))).generate([request])
    return choice.text


def streamed(http: httpx.Client, url: str, body: dict, begun: threading.Barrier | None = None) -> str:
    """The text of a stream; with a barrier, one of which a part has been read when all others have begun, too."""
    text, is_done = "", False
    with http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
        for count, line in enumerate(filter(None, response.iter_lines())):
            if begun and count == 5:
                begun.wait(30)
            is_done = line == "data: [DONE]"
            if not is_done:
                chunk = httpx.Response(200, content=line.removeprefix("data: ")).json()
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["delta"].get("content", "")
    assert is_done
    return text


@pytest.mark.long
def test_streams_keep_the_version_they_began_with(http, url, served_config, store, body):
    """Also when the value replica dies, and its successor has to load a version that is no longer published."""
    bodies = [{**body, "max_tokens": 200, "seed": seed} for seed in range(4)]
    old = [whole_text(http, url, one) for one in bodies]
    begun = threading.Barrier(len(bodies) + 1)
    with ThreadPoolExecutor(len(bodies)) as pool:
        streams = [pool.submit(streamed, http, url, one, begun) for one in bodies]
        begun.wait(30)
        publish(served_config, "positive", 1, seed=8)
        for pid in replica_pids("value-positive", "Value"):
            os.kill(pid, signal.SIGKILL)
        assert [stream.result(60) for stream in streams] == old
    wait_for(http, url, "positive", "positive@i1")
    new = whole_text(http, url, body)
    assert new == in_process(served_config, store, body)
    values.publish(store, "positive", 0)
    wait_for(http, url, "positive", "positive@i0")
    assert new != whole_text(http, url, body) == in_process(served_config, store, body)


def test_an_objective_is_added_while_others_are_in_use(http, url, served_config, store, body):
    expected, stop = whole_text(http, url, body), threading.Event()

    def ask_on() -> list[str]:
        texts = []
        while not stop.is_set():
            texts.append(whole_text(http, url, body))
        return texts

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        try:
            publish(served_config, "kind", 0, seed=9)
            deploy_objective(served_config, "kind", limit_s=120)
            wait_for(http, url, "kind", "kind@i0")
            kind = {**body, "objective_weights": {"kind": 1.0, "brief": 1.0}}
            assert whole_text(http, url, kind) == in_process(served_config, store, kind)
        finally:
            stop.set()
        texts = asking.result(60)
    assert len(texts) > 1
    assert set(texts) == {expected}
