"""The base replica: base model, guide and engine behind one streaming method. A shell around EngineLoop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import torch

from mavis_dist import cluster
from mavis_dist.decode import LocalGuide, Request, Update
from mavis_dist.groups import BaseGroup
from mavis_dist.store.files import Store
from serve.base.engine_loop import EngineLoop
from serve.base.feeds import Feeds
from serve.base.model_loader import LocalModelLoader, ModelLoader, RemoteModelLoader
from serve.base.remote_guide import RemoteGuide
from serve.base.watched_engine import WatchedEngine, report
from serve.logs import configure_logs
from serve.messages import ANYBODY, Admission, Feed, Message
from serve.ray_handles import ValueHandles, replica_name
from serve.scaling import LOAD
from serve.settings import MainArgs

MOST_SHARED_THREADS = 8  # the threads of a small model spend more time waiting for each other the more there are


def num_threads(args: MainArgs) -> int:
    """Threads of a base replica on this machine. Ray's own rule gives a replica that reserves a fraction only one.

    Half of the cores are left to gateway, proxy and value replicas: a thread whose core another process takes delays
    all threads of its step.
    """
    if args.threads is not None:
        return args.threads
    cores = args.cpus if args.cpus >= 1 else min(cluster.cores_here() / 2, MOST_SHARED_THREADS)
    return max(1, int(cores))


class Base:
    def __init__(self, args: MainArgs):
        """Raises Unavailable if no published model can be used with this base model."""
        configure_logs()
        torch.set_num_threads(num_threads(args))
        self._group = BaseGroup(
            args.base,
            args.dtype,
            args.device,
            size=args.tensor_parallel,
            cpus=args.cpus,
            gpus=args.gpus,
            engine=args.engine,
            rows=args.rows,
        )
        base, store = self._group.base, Store(args.storage, args.run)
        is_remote = args.placement == "replicas"
        guide = RemoteGuide((), ValueHandles(), args.value_sessions) if is_remote else LocalGuide({})
        self._rows = args.rows
        engine = WatchedEngine(base, guide, args.rows, args.cache_tokens)
        self._loop = EngineLoop(engine, queue=args.queue, name=replica_name())
        report(engine, self._loop)
        kind: type[ModelLoader] = RemoteModelLoader if is_remote else LocalModelLoader
        self._feeds = Feeds(self._loop, replica_name(), args.stream_interval_ms / 1000)
        self._loader = kind(store, base, guide, self._loop)
        self._loader.begin()

    async def stream(self, request: Request, admission: Admission = ANYBODY) -> AsyncIterator[Message]:
        """The messages of one request. The layers, from inside to outside:

        1. Mailbox: bundles the updates of the engine's thread.
        2. engine_loop.stream: submits the request and yields what happens to it; closing it cancels the request.
        3. Feeds.stream: replaces the updates by the name of the gateway's feed, if it carries them.
        4. ModelLoader.stream: waits for the value models that the request names, then begins the stream within.
        5. This method, since Serve streams only what a generator function of the replica yields.

        The gateway's layers are listed in serve.gateway.streams.answer_stream.
        """
        written = self._feeds.stream(request, admission)
        async with aclosing(self._loader.stream(request, written)) as messages:
            async for message in messages:
                yield message

    async def feed(self, feed: Feed) -> AsyncIterator[list[Update]]:
        """The updates of all answers of a gateway, as long as it has any."""
        async with aclosing(self._feeds.read(feed)) as messages:
            async for updates in messages:
                yield updates

    async def load(self) -> tuple[int, int]:
        """Rows in use and rows waiting; raises EngineStopped."""
        self._loop.check()
        return self._loop.load

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {LOAD: sum(self._loop.load) / self._rows}

    async def check_health(self) -> None:
        self._loop.check()
        await self._group.check()
