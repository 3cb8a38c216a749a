"""Value models are published while answers are generated; each answer keeps the version that it began with."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mavis_dist.config import Config
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.decode.load_guide import fetch_published, load_guide, load_models
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.sections import Limits
from mavis_dist.store import files, layout, values
from mavis_dist.store.files import Store, StoreError
from mavis_dist.train.data import Fit
from mavis_dist.train.model import trainable_model
from mavis_dist.types import RewardScale
from serve.base import model_loader, remote_guide
from serve.base.engine_loop import EngineLoop, stream
from serve.base.model_loader import LocalModelLoader, ModelLoader, RemoteModelLoader
from serve.base.remote_guide import RemoteGuide
from serve.gateway import failover, registry
from serve.gateway.protocol import ApiError
from serve.gateway.registry import Registry
from serve.gateway.streams import answer_stream
from serve.gateway.versions import pinned
from serve.messages import Admission, AnswerFailed, BaseLost, Call, Reply
from serve.model_cache import ModelCache, Unavailable, loaded
from serve.settings import ValueArgs
from serve.value.replica import Value
from tests.tiny import MODEL, publish_distilled, publish_next, publish_shared, write_models

RUN = "run"
LIMITS = Limits(stall_s=20, deadline_s=60)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(failover, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(remote_guide, "RETRY_PAUSE_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path, RUN, ("positive", "brief"))
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(str(folder / "runs"), RUN)


@pytest.fixture
def base(folder: Path) -> BaseModel:
    return load_base(str(folder / MODEL))


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["values/positive/i0", "values/positive/i12", "distilled/5fa0ea24d1"])
def test_a_version_names_its_folder(path):
    assert values.folder_of(values.version("positive", path)) == path
    assert values.objective_of(values.version("positive", path)) == "positive"


@pytest.mark.parametrize(
    "name",
    ["positive", "", "@i0", "a@", "a@i", "a@i-1", "a@i0\n", "../a@i0", "a/b@i0", "a@d../x", "a@x1", "ä@i0"],
)
def test_nothing_else_names_a_folder(name):
    with pytest.raises(StoreError, match="no version"):
        values.folder_of(name)


def test_what_is_served_has_a_version(store, folder):
    publish_next(folder, RUN, "positive", 1, seed=8)
    assert {name: model.version for name, model in values.served(store).items()} == {
        "positive": "positive@i1",
        "brief": "brief@i0",
    }
    store.write_json("values/brief/published.json", {"iteration": 0, "distilled": "5fa0"})
    assert values.served(store)["brief"].version == "brief@d5fa0"
    assert values.published_folders(store) == {"brief": "distilled/5fa0", "positive": "values/positive/i1"}


# --- what is held ------------------------------------------------------------------------------------------------


class Things:
    """Loads by name what a cache asks for; slow where told, and failing where told."""

    def __init__(self, idle_s: float = 1000.0):
        self.loaded: list[str] = []
        self.dropped: list[str] = []
        self.wanted: set[str] = set()
        self.gate, self.broken = threading.Event(), set()
        self.gate.set()
        self.cache = ModelCache(self._load, lambda: self.wanted, self.dropped.append, idle_s)

    def _load(self, name: str) -> str:
        self.loaded.append(name)
        assert self.gate.wait(10)
        if name in self.broken:
            raise StoreError(f"{name} is damaged")
        return name.upper()

    async def use(self, *names: str) -> list[str]:
        with self.cache.hold(names) as loads:
            assert await loaded(loads)
            return [load.result() for load in loads]


def test_concurrent_users_of_a_name_load_it_once():
    things = Things()
    things.gate.clear()

    async def run() -> list[list[str]]:
        users = [asyncio.create_task(things.use("a", "b")) for _ in range(20)]
        await asyncio.sleep(0.05)
        users[0].cancel()  # whoever leaves takes nothing from the others
        things.gate.set()
        return await asyncio.gather(*users[1:])

    assert asyncio.run(run()) == [["A", "B"]] * 19
    assert asyncio.run(things.use("b")) == ["B"]
    assert sorted(things.loaded) == ["a", "b"]


def test_a_failure_to_load_reaches_the_users_of_the_name(monkeypatch):
    things = Things()
    things.broken.add("bad")

    async def run() -> list:
        users = [things.use("bad"), things.use("good", "bad"), things.use("good")]
        return await asyncio.gather(*users, return_exceptions=True)

    *failures, fine = asyncio.run(run())
    assert fine == ["GOOD"]
    assert {str(failure) for failure in failures} == {"bad cannot be loaded: bad is damaged"}
    things.broken.clear()
    with pytest.raises(Unavailable):  # not tried again at once
        asyncio.run(things.use("bad"))
    monkeypatch.setattr("serve.model_cache.RETRY_S", 0.0)
    assert asyncio.run(things.use("bad")) == ["BAD"]


def test_idle_models_are_dropped_unless_wanted_or_used():
    things = Things(idle_s=0.05)
    things.wanted.add("wanted")

    async def run() -> None:
        with things.cache.hold(["used"]) as loads:
            await loaded(loads)
            await things.use("wanted")
            await things.use("idle")
            await until(lambda: things.dropped == ["IDLE"])
            assert "used" in things.cache
            assert "wanted" in things.cache

    asyncio.run(run())
    assert asyncio.run(things.use("idle")) == ["IDLE"]
    assert things.loaded.count("idle") == 2


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# --- base replicas -----------------------------------------------------------------------------------------------


class Pending:
    def __init__(self, reply: Reply):
        self._reply = reply

    def result(self, timeout_s: float) -> Reply:
        return self._reply


class ValueReplicas:
    """One value replica per objective, begun when it is first asked; each can be begun again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.running: dict[str, Value] = {}

    def __call__(self, version: str, session: str, call: Call) -> Pending:
        objective = values.objective_of(version)
        if objective not in self.running:
            args = ValueArgs(storage=str(self._folder / "runs"), run=RUN, objective=objective, dtype="float32")
            self.running[objective] = Value(args)
        return Pending(asyncio.run(self.running[objective].answer(call)))


class Bases:
    """Base replicas as the gateway sees them; an answer may lose the one that writes it."""

    def __init__(self, folder: Path, store: Store, base: BaseModel, placement: str):
        self._folder, self._store, self._base, self._placement = folder, store, base, placement
        self.values = ValueReplicas(folder)
        self.running: list[tuple[EngineLoop, ModelLoader]] = []
        self.begin()

    def begin(self) -> None:
        is_remote = self._placement == "replicas"
        guide = RemoteGuide((), self.values, limit_s=5.0) if is_remote else LocalGuide({})
        loop = EngineLoop(Engine(self._base, guide, 8))
        self.running.append(
            (loop, (RemoteModelLoader if is_remote else LocalModelLoader)(self._store, self._base, guide, loop))
        )
        self.running[-1][1].begin()

    def end(self) -> None:
        for loop, _ in self.running:
            loop.stop()

    async def open(self, request: Request, lose_after: int = 0, on_loss: Callable[[], None] = lambda: None):
        """A stream of the latest replica; `on_loss` happens before it is lost after so many messages with tokens."""
        loop, loader = self.running[-1]
        async with aclosing(loader.stream(request, stream(loop, request))) as messages:
            async for message in messages:
                yield message
                lose_after -= isinstance(message, list) and bool(message)
                if isinstance(message, list) and message and lose_after == 0:
                    on_loss()
                    raise BaseLost("killed")

    async def answer(self, request: Request, versions: dict[str, str], **losing) -> list[int]:
        left = [losing]

        def open_stream(current: Request, _: Admission):
            return self.open(current, **(left.pop() if left else {}))

        tokens: list[int] = []
        async with aclosing(answer_stream(request, open_stream, LIMITS, versions=versions)) as items:
            accepted = await anext(items)
            assert isinstance(accepted, Request)
            assert accepted.weights.keys() == request.weights.keys()
            async for piece in items:
                tokens += piece.tokens
                last = piece.finished
        assert last.values.keys() == request.weights.keys()
        return tokens


@pytest.fixture(params=["colocated", "replicas"])
def bases(request, folder, store, base) -> Iterator[Bases]:
    bases = Bases(folder, store, base, request.param)
    yield bases
    bases.end()


def make_request(name: str = "r", **weights: float) -> Request:
    weights = weights or {"positive": 1.0, "brief": 2.0}
    return Request(name, (5, 6, 7), weights, beta=3.0, params=SamplingParams(max_tokens=30, top_k=20, seed=4))


def expected(store: Store, base: BaseModel, request: Request, iterations: dict[str, int]) -> list[int]:
    """What the engine of one process writes, without names of versions."""
    paths = {name: values.fetch(store, name, iteration) for name, iteration in iterations.items()}
    [[choice]] = Engine(base, LocalGuide(load_models(paths))).generate([request])
    return choice.tokens


OLD = {"positive": "positive@i0", "brief": "brief@i0"}
NEW = {"positive": "positive@i1", "brief": "brief@i0"}


def test_an_answer_ends_with_the_version_it_began_with_also_on_another_replica(bases, folder, store, base):
    """Published meanwhile: a base replica begun later has to load what is not published any more."""

    def publish() -> None:
        publish_next(folder, RUN, "positive", 1, seed=8)
        bases.values.running.clear()
        bases.begin()

    tokens = asyncio.run(bases.answer(make_request(), OLD, lose_after=8, on_loss=publish))
    old, new = (expected(store, base, make_request(), {"positive": i, "brief": 0}) for i in (0, 1))
    assert tokens == old
    assert asyncio.run(bases.answer(make_request("next"), NEW)) == new
    assert old != new


def test_old_and_new_versions_generate_side_by_side(bases, folder, store, base):
    publish_next(folder, RUN, "positive", 1, seed=8)

    async def run() -> list[list[int]]:
        versions = [OLD, NEW] * 3
        return await asyncio.gather(*(bases.answer(make_request(str(i)), v) for i, v in enumerate(versions)))

    both = [expected(store, base, make_request(), {"positive": i, "brief": 0}) for i in (0, 1)]
    assert asyncio.run(run()) == both * 3


def test_an_objective_published_later_is_served_at_once(bases, folder, store, base):
    publish_next(folder, RUN, "kind", 0, seed=9)
    request = make_request(kind=1.0, brief=1.0)
    tokens = asyncio.run(bases.answer(request, {"kind": "kind@i0", "brief": "brief@i0"}))
    assert tokens == expected(store, base, request, {"kind": 0, "brief": 0})


@pytest.mark.parametrize("scorer", [Scorer.LAZY, Scorer.QHEAD, Scorer.PREDICTED])
def test_objectives_of_a_distilled_model_share_it(folder, store, base, scorer):
    bases = Bases(folder, store, base, "colocated")
    publish_distilled(folder, RUN, ("positive", "brief"), "5fa0")
    versions = asyncio.run(Registry(store).versions())
    assert versions == {"positive": "positive@d5fa0", "brief": "brief@d5fa0"}
    request = replace(make_request(), scorer=scorer)
    first = asyncio.run(bases.answer(replace(make_request("one"), weights={"brief": 1.0}), versions))
    tokens = asyncio.run(bases.answer(request, versions, lose_after=5, on_loss=bases.begin))
    [[choice]] = Engine(base, load_guide(fetch_published(store))).generate([request])
    assert tokens == choice.tokens
    assert len(first) > 0
    guide = bases.running[0][1]._guide
    kinds = [trunk.valuation for trunk in guide._trunks if set(trunk.heads) == set(versions.values())]
    assert sorted(kind.value for kind in kinds) == ["checked", "evaluated", "predicted"]
    bases.end()


def test_objectives_of_a_shared_model_are_served_under_their_own_names(bases, folder, store, base):
    publish_shared(store, folder, ("positive", "brief"), like="positive")
    bases.begin()  # a replica that starts later
    tokens = asyncio.run(bases.answer(make_request(), OLD))
    [[choice]] = Engine(base, load_guide(fetch_published(store))).generate([make_request()])
    assert tokens == choice.tokens
    assert [entry["version"] for entry in asyncio.run(Registry(store).describe())] == sorted(OLD.values())
    guide = bases.running[-1][1]._guide
    if isinstance(guide, LocalGuide):
        assert [set(trunk.heads) for trunk in guide._trunks].count(set(OLD.values())) == 1


def test_a_later_iteration_starts_from_its_own_head_of_a_shared_model(folder, store):
    publish_shared(store, folder, ("positive", "brief"), like="positive")
    shared, _ = value.load(values.fetch(store, "brief", 0))
    fit = Fit(("brief",), 1, 0, (RewardScale(0.0, 1.0),), frozenset())
    own = trainable_model(fit, Config(run=RUN, objectives={"brief": {"reward": "brevity"}}), store)
    torch.testing.assert_close(own.heads.weight, shared.heads.weight[1:])
    torch.testing.assert_close(own.heads.bias, shared.heads.bias[1:])
    assert all(p.requires_grad for p in own.heads.parameters())


def test_value_replicas_serve_distilled_models_too(folder, store, base):
    bases = Bases(folder, store, base, "replicas")
    publish_distilled(folder, RUN, ("positive", "brief"), "5fa0")
    tokens = asyncio.run(bases.answer(make_request(), {name: f"{name}@d5fa0" for name in OLD}))
    [[choice]] = Engine(base, load_guide(fetch_published(store))).generate([make_request()])
    assert tokens == choice.tokens
    bases.end()


def break_model(store: Store, path: str) -> None:
    """Leave a folder finished, with weights that are none."""
    store.write_bytes(f"{path}/model.safetensors", b"nothing")
    store.finish(path, {})


@pytest.mark.parametrize("damage", ["weights", "unfinished", "other base"])
def test_a_version_that_cannot_be_loaded_ends_its_own_requests(bases, folder, store, base, damage, monkeypatch):
    monkeypatch.setattr(files, "LATE_S", 0.1)
    publish_next(folder, RUN, "positive", 1, seed=8)
    path = layout.value_folder("positive", 1)
    if damage == "weights":
        break_model(store, path)
    elif damage == "unfinished":
        store.delete(f"{path}/_COMPLETE.json")
    else:
        card = store.read_json(f"{path}/mavis.json")
        store.write_bytes(f"{path}/mavis.json", json.dumps({**card, "base_fingerprint": "another"}).encode())
        store.finish(path, {})

    async def run() -> tuple:
        requests = [bases.answer(make_request("a"), NEW), bases.answer(make_request("b"), OLD)]
        return tuple(await asyncio.gather(*requests, return_exceptions=True))

    failed, fine = asyncio.run(run())
    assert isinstance(failed, AnswerFailed)
    assert "positive" in str(failed)
    assert "cannot be loaded" in str(failed)
    assert fine == expected(store, base, make_request(), {"positive": 0, "brief": 0})
    bases.begin()  # while it is published: for the sake of all others
    bases.values.running.pop("brief", None)
    assert asyncio.run(bases.answer(make_request(brief=1.0), OLD)) == expected(
        store, base, make_request(brief=1.0), {"brief": 0}
    )


def test_loading_delays_no_other_request(bases, folder, store, base, monkeypatch):
    """Who waits for a model is told so, and others write meanwhile."""
    monkeypatch.setattr(model_loader, "HEARTBEAT_S", 0.01)
    asyncio.run(bases.answer(make_request("first"), OLD))
    publish_next(folder, RUN, "positive", 1, seed=8)
    gate, load = threading.Event(), values.fetch_folder

    def slow(store: Store, path: str) -> Path:
        assert path != "values/positive/i1" or gate.wait(20)
        return load(store, path)

    monkeypatch.setattr(values, "fetch_folder", slow)

    async def run() -> tuple[list, list[int], list[int]]:
        waiting = asyncio.create_task(bases.answer(make_request("new"), NEW))
        messages = pinned(lambda request, _: bases.open(request), NEW)(make_request("watched"), Admission())
        first = [await anext(messages) for _ in range(3)]
        await messages.aclose()
        old = await bases.answer(make_request("old"), OLD)
        assert not waiting.done()
        gate.set()
        return first, old, await waiting

    first, old, new = asyncio.run(run())
    assert first == [[], [], []]
    assert [old, new] == [expected(store, base, make_request(), {"positive": i, "brief": 0}) for i in (0, 1)]


def test_a_superseded_version_is_dropped_when_idle(folder, store, base):
    guide = LocalGuide({})
    loop = EngineLoop(Engine(base, guide))
    loader = LocalModelLoader(store, base, guide, loop, idle_s=0.05)
    loader.begin()
    publish_next(folder, RUN, "positive", 1, seed=8)

    async def write(version: str) -> None:
        request = Request(version, (5, 6), {version: 1.0}, params=SamplingParams(max_tokens=3))
        async with aclosing(loader.stream(request, stream(loop, request))) as messages:
            assert [message async for message in messages][-1][-1].finished.error is None

    async def run() -> None:
        await write("positive@i1")
        await until(lambda: "positive@i0" not in guide.objectives)

    asyncio.run(run())
    assert set(guide.objectives) == {"brief@i0", "positive@i1"}
    asyncio.run(write("positive@i0"))  # a request that comes back after a long time
    loop.stop()


def test_no_usable_model_is_an_error_at_the_start(folder, store, base):
    for name in ("positive", "brief"):
        break_model(store, layout.value_folder(name, 0))
    loop = EngineLoop(Engine(base, guide := LocalGuide({})))
    with pytest.raises(Unavailable, match="cannot be loaded"):
        LocalModelLoader(store, base, guide, loop).begin()
    loop.stop()


def test_an_invalid_version_reaches_no_file(bases):
    versions = {"positive": "../../positive@i0", "brief": "brief@i0"}
    with pytest.raises(AnswerFailed, match="no version"):
        asyncio.run(bases.answer(make_request(), versions))


def test_a_value_replica_values_its_own_objective_only(folder):
    replica = Value(ValueArgs(storage=str(folder / "runs"), run=RUN, objective="brief", dtype="float32"))
    reply = asyncio.run(replica.answer(Call("s", version="positive@i0")))
    assert "values 'brief', not 'positive'" in reply.error
    with pytest.raises(StoreError, match="train it first"):
        Value(ValueArgs(storage=str(folder / "runs"), run=RUN, objective="kind"))


# --- the gateway -------------------------------------------------------------------------------------------------


def test_the_registry_follows_the_store_and_survives_its_loss(folder, store, monkeypatch):
    followed = Registry(store, fresh_s=0.0)
    assert asyncio.run(followed.versions()) == {"brief": "brief@i0", "positive": "positive@i0"}
    publish_next(folder, RUN, "positive", 1, seed=8)
    assert asyncio.run(followed.versions()) == {"brief": "brief@i0", "positive": "positive@i1"}
    monkeypatch.setattr(values, "served", lambda _: 1 / 0)
    assert asyncio.run(followed.versions()) == {"brief": "brief@i0", "positive": "positive@i1"}
    with pytest.raises(ApiError, match="cannot be read") as caught:
        asyncio.run(Registry(store).versions())
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")


def test_an_objective_without_replicas_is_described_as_such(store):
    def described(replicas) -> list[int | None]:
        return [o["value_replicas"] for o in asyncio.run(Registry(store, replicas=replicas).describe())]

    assert described(lambda: {"positive": 2}) == [0, 2]
    assert described(dict) == [0, 0]
    assert described(None) == described(lambda: 1 / 0) == [None, None]


def test_a_hanging_count_delays_neither_the_store_nor_another_thread(folder, store, monkeypatch):
    monkeypatch.setattr(registry, "COUNT_LIMIT_S", 0.05)
    counts, goes_on = [], threading.Event()

    def hanging() -> dict[str, int]:
        counts.append(1)
        goes_on.wait(timeout=60)
        return {"brief": 1, "positive": 1}

    async def ask() -> list[list[int | None]]:
        asked = Registry(store, fresh_s=0.0, replicas=hanging)
        seen = await asyncio.gather(*(asked.describe() for _ in range(40)))
        assert await asyncio.wait_for(asked.versions(), 10)
        goes_on.set()
        return [[one["value_replicas"] for one in objectives] for objectives in (*seen, await asked.describe())]

    *before, after = asyncio.run(ask())
    assert before == [[None, None]] * 40
    assert after == [1, 1]
    assert len(counts) <= 2  # and the one after it went on


def test_what_is_published_is_described_with_its_version(folder, store):
    publish_next(folder, RUN, "positive", 1, seed=8)
    described = asyncio.run(Registry(store).describe())
    assert [(o["id"], o["version"], o["iteration"]) for o in described] == [
        ("brief", "brief@i0", 0),
        ("positive", "positive@i1", 1),
    ]
