"""The value replica: one objective's value models, every version in use. A shell around Sessions."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

from mavis_dist.decode.load_guide import load_models
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store import values
from mavis_dist.store.files import Store, StoreError
from serve.logs import configure_logs
from serve.messages import Call, Reply
from serve.model_cache import ModelCache, Unavailable, loaded
from serve.scaling import LOAD
from serve.settings import ValueArgs
from serve.value.sessions import Sessions

# Longer than base replicas keep a version, so that none asks for a model that is gone.
IDLE_S = 600.0


class Value:
    def __init__(self, args: ValueArgs):
        configure_logs()
        # All objectives are asked at the same time: with more threads than cores, they would wait for each other.
        torch.set_num_threads(max(1, int(args.cpus)))
        self._args, self._store = args, Store(args.storage, args.run)
        self._base_lock = threading.Lock()
        self._loaded_base: BaseModel | None = None
        published = self._published()
        if not published:
            raise StoreError(f"no value model of {args.objective!r} is published in {self._store.root}: train it first")
        self._models: ModelCache[Sessions] = ModelCache(self._load, self._published, idle_s=IDLE_S)
        with self._models.hold(published) as loads:
            wait(loads)  # a model that cannot be loaded fails its own requests, not those on older versions
        # One thread: the sessions take calls one at a time, and the event loop stays free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="value")
        self._call_seconds, self._reported_at = 0.0, time.monotonic()

    async def answer(self, call: Call) -> Reply:
        """The reply of the model that the call names, loaded first if need be."""
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
        """Mean number of calls under way since the last report; below 1, the share of time they take."""
        seconds, now = self._call_seconds, time.monotonic()
        load = seconds / (now - self._reported_at)
        self._call_seconds, self._reported_at = 0.0, now
        return {LOAD: load}

    def _load(self, version: str) -> Sessions:
        objective, folder = values.objective_of(version), values.folder_of(version)
        if objective != self._args.objective:
            raise StoreError(f"this replica values {self._args.objective!r}, not {objective!r}")
        path, args = values.fetch_folder(self._store, folder), self._args
        base = None if value.load_card(path).state_layer is None else self._base()
        [model] = load_models({objective: path}, getattr(torch, args.dtype), args.device, base).values()
        return Sessions(version, model)

    def _base(self) -> BaseModel:
        """The base model, for value models that read its states; loaded once, on first use."""
        with self._base_lock:
            if self._loaded_base is None:
                self._loaded_base = load_base(self._args.base, self._args.dtype, self._args.device)
            return self._loaded_base

    def _published(self) -> set[str]:
        model = values.served(self._store).get(self._args.objective)
        return {model.version} if model else set()
