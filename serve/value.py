"""The value replica: one objective's value model. A shell around Sessions."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from mavis_dist.decode.published import fetch_published, load_models
from mavis_dist.store.files import Store, StoreError
from serve.logs import configure_logs
from serve.sessions import Call, Reply, Sessions
from serve.settings import ValueArgs


class Value:
    def __init__(self, args: ValueArgs):
        configure_logs()
        store = Store(args.storage, args.run)
        folders = fetch_published(store)
        if args.objective not in folders:
            raise StoreError(f"no value model of {args.objective!r} is published in {store.root}: train it first")
        folder = {args.objective: folders[args.objective]}
        models = load_models(folder, getattr(torch, args.dtype), args.device)
        self._sessions = Sessions(args.objective, models[args.objective])
        # One thread: the sessions take calls one at a time, and the event loop stays free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="value")

    async def answer(self, call: Call) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._sessions.answer, call)
