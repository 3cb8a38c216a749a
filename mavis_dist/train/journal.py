"""Training metrics: for TensorBoard while training runs, and as JSON lines at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = "figures"  # by objective: an entry of metrics beside its plain numbers
Metrics = dict[str, Any]


class Journal:
    """TensorBoard event files, anywhere that fsspec can write."""

    def __init__(self, uri: str, last_step: int):
        """Purges what an earlier attempt wrote after `last_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(uri, purge_step=last_step + 1)

    def write(self, entry: Metrics) -> None:
        """The numbers of an entry; figures under the names of their objectives, if there are several."""
        figures = entry.get(FIGURES, {})
        prefixes = {objective: f"{objective}/" if len(figures) > 1 else "" for objective in figures}
        named = {f"{prefixes[o]}{name}": number for o, found in figures.items() for name, number in found.items()}
        for name, number in {**entry, **named}.items():
            if name not in ("step", FIGURES):
                self._writer.add_scalar(name, number, entry["step"])
        self._writer.flush()


def metrics_of(objective: str, entries: Sequence[Metrics]) -> list[dict[str, float]]:
    """The entries with the figures of one objective only, flat."""
    return [
        {
            **{name: number for name, number in entry.items() if name != FIGURES},
            **entry.get(FIGURES, {}).get(objective, {}),
        }
        for entry in entries
    ]


def json_lines(entries: Sequence[Mapping[str, float]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
