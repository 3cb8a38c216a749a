"""Training workers without Ray: `python -m tests.training.zero_worker CONFIG OUTPUT RANK SIZE PORT < variants.json`.

Standard input maps names to overrides of the config; every variant is trained in turn by the same processes. The
override `stop=N` interrupts it after N steps and restarts it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from mavis_dist.config import load
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit
from mavis_dist.train.fit import train
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import RewardScale

FIT = Fit(("vowels",), 0, None, (RewardScale(3.0, 2.0),), frozenset({"p0"}))


def main(config_file: str, output: str, rank: int, size: int, port: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(1)
    data = load(config_file)
    for name, overrides in json.load(sys.stdin).items():
        stops = [int(text.removeprefix("stop=")) for text in overrides if text.startswith("stop=")]
        settings = [text for text in overrides if not text.startswith("stop=")]
        config = load(config_file, [*settings, f"storage={output}", f"run={name}", f"train.workers={size}"])
        if rank == 0:
            for folder in ("rollouts", "labels"):
                shutil.copytree(Path(data.storage, data.run, folder), Path(output, name, folder))
        torch.distributed.barrier()
        store = Store(config.storage, config.run)
        for stop in stops:
            steps = itertools.count(1)
            assert not train(FIT, config, store, WorkerGroup(rank, size, wants_stop=lambda: next(steps) == stop))  # noqa: B023
        assert train(FIT, config, store, WorkerGroup(rank, size))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
