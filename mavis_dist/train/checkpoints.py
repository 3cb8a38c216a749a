"""Checkpoints of unfinished training: a checkpoint is complete or does not count, and the newest complete one is used.

Every worker writes its own files; worker 0 writes the marker once all files are there. The marker holds the sizes of
the files, so that a torn or lost file costs only the steps since the previous checkpoint.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mavis_dist.sections import Train
from mavis_dist.store.files import Store
from mavis_dist.train.journal import Metrics
from mavis_dist.train.worker_group import WorkerGroup

EVERY_S = 60.0
KEPT = 2  # the newest may be unreadable
ENGINE, STATE_FILE, BEST_FILE = "engine", "state.json", "best.safetensors"


@dataclass
class State:
    """Progress of training, apart from the weights and the optimiser's state."""

    step: int = 0
    best_score: float | None = None
    best_epoch: int = -1
    best_figures: dict[str, dict[str, float]] = field(default_factory=dict)  # by objective
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # trained parameters of the best epoch; on worker 0
    metrics: list[Metrics] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, store: Store, folder: str, group: WorkerGroup, settings: Train):
        """Only checkpoints of the same sharding are loaded: states are split by workers and ZeRO stage."""
        self._store, self._folder, self._group = store, folder, group
        self._sharding = {
            "workers": group.size,
            "zero_stage": settings.zero_stage,
            "offload": settings.offload,
        }
        self._saved_at = time.monotonic()

    def save_if_due(self, engine: Any, state: State, is_due: bool = False) -> bool:
        """Save if `is_due`, after EVERY_S, and before a stop. Call it on all workers, after every step.

        Returns whether the driver has asked for a stop.
        """
        is_late = time.monotonic() - self._saved_at > EVERY_S
        is_stopping, is_late = self._group.broadcast((self._group.wants_stop(), is_late))
        if is_stopping or is_late or is_due:
            self.save(engine, state)
            self._saved_at = time.monotonic()
        return is_stopping

    def save(self, engine: Any, state: State) -> None:
        """Call it on all workers."""
        target = f"{self._folder}/step-{state.step:08d}"
        if self._group.rank == 0:
            self._store.delete(target)  # remains of an attempt that died while saving
        self._group.barrier()
        with tempfile.TemporaryDirectory() as local:
            engine.save_checkpoint(local, tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            folder = Path(local) / ENGINE
            folder.mkdir(exist_ok=True)
            if self._group.rank == 0:
                _write_state(folder, state)
            names = sorted(file.name for file in folder.iterdir())
            for name in names:
                self._store.write_bytes(f"{target}/{name}", (folder / name).read_bytes())
        written = [name for names in self._group.gather(names) for name in names]
        if self._group.rank == 0:
            self._store.finish(target, self._sharding, written)
            kept = self._usable()[-KEPT:]
            for name in self._store.list(self._folder):
                if name not in kept:
                    self._store.delete(f"{self._folder}/{name}")

    def load(self, engine: Any) -> State:
        """Load the newest complete checkpoint, or return a fresh state if there is none. Call it on all workers."""
        name = self._group.broadcast(next(reversed(self._usable()), None) if self._group.rank == 0 else None)
        if name is None:
            return State()
        folder = self._store.download(f"{self._folder}/{name}")
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        return _read_state(folder)

    def delete(self) -> None:
        self._store.delete(self._folder)

    def _usable(self) -> list[str]:
        """Names of the complete checkpoints of this sharding, the newest one last."""
        names = self._store.list(self._folder)
        return [name for name in names if self._store.metadata(f"{self._folder}/{name}") == self._sharding]


def _write_state(folder: Path, state: State) -> None:
    plain = {name: value for name, value in vars(state).items() if name != "best"}
    (folder / STATE_FILE).write_text(json.dumps(plain))
    if state.best:
        save_file(state.best, folder / BEST_FILE)


def _read_state(folder: Path) -> State:
    best = load_file(folder / BEST_FILE) if (folder / BEST_FILE).exists() else {}
    return State(**json.loads((folder / STATE_FILE).read_text()), best=best)
