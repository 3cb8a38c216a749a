"""The base replica: base model, guide and engine behind one streaming method. A shell around EngineLoop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import torch

from mavis_dist.decode import Guide, Request
from mavis_dist.decode.published import fetch_published, load_guide
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store
from serve.admission import ANYBODY, Entry
from serve.answers import Message
from serve.engine_loop import EngineLoop, stream
from serve.handles import ValueHandles, replica_name
from serve.logs import configure_logs
from serve.metrics import WatchedEngine, report
from serve.remote_guide import RemoteGuide
from serve.settings import MainArgs


def make_guide(args: MainArgs, base: BaseModel) -> Guide | None:
    """The published value models of the run, in this process or behind handles; None if there are none.

    Raises:
        ValueModelError: if one was not trained for this base model.
    """
    folders = fetch_published(Store(args.storage, args.run))
    for folder in folders.values():
        value.load_card(folder).check(base.fingerprint, base.tokenizer_fingerprint)
    if not folders:
        return None
    if args.placement == "replicas":
        return RemoteGuide(tuple(folders), ValueHandles(), args.value_sessions)
    return load_guide(folders, getattr(torch, args.dtype), args.device)


class Base:
    def __init__(self, args: MainArgs):
        configure_logs()
        base = load_base(args.base, args.dtype, args.device)
        engine = WatchedEngine(base, make_guide(args, base), args.rows)
        self._loop = EngineLoop(engine, queue=args.queue, name=replica_name())
        report(engine, self._loop)

    async def stream(self, request: Request, entry: Entry = ANYBODY) -> AsyncIterator[Message]:
        """What serve.engine_loop.stream yields."""
        async with aclosing(stream(self._loop, request, entry)) as messages:
            async for message in messages:
                yield message

    async def load(self) -> tuple[int, int]:
        """Rows in use and rows waited for; raises EngineStopped."""
        self._loop.check()
        return self._loop.load

    def check_health(self) -> None:
        self._loop.check()
