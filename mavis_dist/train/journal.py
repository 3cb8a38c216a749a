"""Training metrics: for TensorBoard while training runs, and as JSON lines at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


class Journal:
    """TensorBoard event files, anywhere that fsspec can write."""

    def __init__(self, uri: str, last_step: int):
        """Purges what an earlier attempt wrote after `last_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(uri, purge_step=last_step + 1)

    def write(self, entry: Mapping[str, float]) -> None:
        for name, number in entry.items():
            if name != "step":
                self._writer.add_scalar(name, number, entry["step"])
        self._writer.flush()


def json_lines(entries: Sequence[Mapping[str, float]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
