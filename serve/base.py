"""The base replica: base model, guide and engine behind one streaming method. A shell around EngineLoop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import torch

from mavis_dist.decode import Guide, Request
from mavis_dist.decode.published import fetch_published, load_guide
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store
from serve.answers import Message
from serve.engine_loop import EngineLoop, stream
from serve.handles import ValueHandles
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
        base = load_base(args.base, args.dtype, args.device)
        engine = WatchedEngine(base, make_guide(args, base), args.rows)
        self._loop = EngineLoop(engine)
        report(engine, self._loop)

    async def stream(self, request: Request) -> AsyncIterator[Message]:
        """What serve.engine_loop.stream yields."""
        async for message in stream(self._loop, request):
            yield message

    async def load(self) -> tuple[int, int]:
        """Answers being written and answers waiting; raises EngineStopped."""
        self._loop.check()
        return self._loop.load

    def check_health(self) -> None:
        self._loop.check()
