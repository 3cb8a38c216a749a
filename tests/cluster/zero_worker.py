"""One training worker without Ray: `python -m tests.cluster.zero_worker CONFIG OUTPUT dotted.key=value ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mavis_dist.config import load
from mavis_dist.models import value
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit
from mavis_dist.train.fit import train
from mavis_dist.train.team import Team
from mavis_dist.types import RewardScale


def main(config_file: str, output: str, *overrides: str) -> None:
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    config = load(config_file, overrides)
    store = Store(config.storage, config.run)
    fit = Fit("vowels", 0, None, RewardScale(3.0, 2.0), frozenset({"p0"}))
    assert train(fit, config, store, Team())
    model, _ = value.load(values.fetch(store, "vowels", 0))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
