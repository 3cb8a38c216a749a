"""What happens during training, as numbers: for TensorBoard while it runs, and one JSON object a line at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Journal:
    """TensorBoard's event files, in any place that fsspec can write to."""

    def __init__(self, uri: str, last_step: int):
        """Takes back what an earlier attempt wrote of steps after `last_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(uri, purge_step=last_step + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        for name, number in entry.items():
            if name != "step":
                self._writer.add_scalar(name, number, entry["step"])
        self._writer.flush()


def json_lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
