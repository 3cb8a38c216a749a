"""The value replica: one objective's value models, as many versions as are in use. A shell around Sessions."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

from mavis_dist.decode.load_guide import load_models
from mavis_dist.store import values
from mavis_dist.store.files import Store, StoreError
from serve.logs import configure_logs
from serve.messages import Call, Reply
from serve.model_cache import ModelCache, Unavailable, loaded
from serve.scaling import LOAD
from serve.settings import ValueArgs
from serve.value.sessions import Sessions

# Longer than base replicas hold on to a version, so that none of them asks for what is not there any more.
IDLE_S = 600.0


class Value:
    def __init__(self, args: ValueArgs):
        configure_logs()
        # All objectives are asked at the same time: more threads than cores would wait for each other at every product.
        torch.set_num_threads(max(1, int(args.cpus)))
        self._args, self._store = args, Store(args.storage, args.run)
        published = self._published()
        if not published:
            raise StoreError(f"no value model of {args.objective!r} is published in {self._store.root}: train it first")
        self._models: ModelCache[Sessions] = ModelCache(self._load, self._published, idle_s=IDLE_S)
        with self._models.hold(published) as loads:
            wait(loads)  # one that cannot be loaded is an error for its requests, not for those on older versions
        # One thread: the sessions take calls one at a time, and the event loop stays free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="value")
        self._call_seconds, self._told_at = 0.0, time.monotonic()

    async def answer(self, call: Call) -> Reply:
        """The reply of the model that the call names, which may have to be loaded first."""
        with self._models.hold([call.version]) as loads:
            try:
                await loaded(loads)
            except Unavailable as error:
                return Reply(np.empty(0, dtype=np.float32), error=str(error))
            sessions = loads[0].result()
            began = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, sessions.answer, call)
            finally:
                self._call_seconds += time.monotonic() - began

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Calls answered or waiting, on average since the last time; below 1 it is the share of time they take."""
        seconds, now = self._call_seconds, time.monotonic()
        load = seconds / (now - self._told_at)
        self._call_seconds, self._told_at = 0.0, now
        return {LOAD: load}

    def _load(self, version: str) -> Sessions:
        objective, folder = values.objective_of(version), values.folder_of(version)
        if objective != self._args.objective:
            raise StoreError(f"this replica values {self._args.objective!r}, not {objective!r}")
        path = values.fetch_folder(self._store, folder)
        [model] = load_models({objective: path}, getattr(torch, self._args.dtype), self._args.device).values()
        return Sessions(version, model)

    def _published(self) -> set[str]:
        model = values.served(self._store).get(self._args.objective)
        return {model.version} if model else set()
