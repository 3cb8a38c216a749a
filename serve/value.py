"""The value replica: one objective's value model. A shell around Sessions."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from mavis_dist.models import value
from mavis_dist.store import values
from mavis_dist.store.files import Store, StoreError
from serve.sessions import Call, Reply, Sessions
from serve.settings import ValueArgs


class Value:
    def __init__(self, args: ValueArgs):
        store = Store(args.storage, args.run)
        published = values.published(store)
        if args.objective not in published:
            raise StoreError(f"no value model of {args.objective!r} is published in {store.root}: train it first")
        folder = values.fetch(store, args.objective, published[args.objective])
        model, _ = value.load(folder, getattr(torch, args.dtype), args.device)
        self._sessions = Sessions(args.objective, model)
        # One thread: the sessions take calls one at a time, and the event loop stays free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="value")

    async def answer(self, call: Call) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._sessions.answer, call)
