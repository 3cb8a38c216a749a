"""Many answers of the base model to the unseen prompts, which tell the limit of steering. No Ray.

They do not depend on any value model: a run samples them once, and scores them once per objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mavis_dist.decode import Request, SamplingParams
from mavis_dist.evaluate import sweep
from mavis_dist.evaluate.sweep import Point
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt

POINT = Point("limit")
FIRST_SEED = 2**32  # the sweep takes the numbers of the prompts; these answers are independent of it
BATCH = 256  # answers that an actor works on at the same time: several times its rows, but a small part of all

Rows = TypeVar("Rows", list[list[str]], list[list[float]])


def request_id(prompt: Prompt) -> str:
    return sweep.request_id(POINT, prompt)


def requests(prompts: Sequence[Prompt], params: SamplingParams) -> list[list[tuple[Prompt, Request]]]:
    """The requests in groups of about BATCH answers; the worker fills in the prompts' tokens."""
    asked = sweep.requests(POINT, prompts, beta=0.0, tilt_cap=None, params=params, first_seed=FIRST_SEED)
    size = max(1, BATCH // params.n)
    return [asked[start : start + size] for start in range(0, len(asked), size)]


def cached(store: Store, folder: str, num_answers: int, make: Callable[[], Rows]) -> Rows:
    """One list per prompt with something of each of its answers, stored in a folder of its own once it is made.

    Prompts and settings of sampling cannot change within a run; only the number of answers can.
    """
    path, inputs = f"{folder}/by_prompt.json", {"answers": num_answers}
    if store.metadata(folder) == inputs:
        rows: Rows = store.read_json(path)
        return rows
    rows = make()
    store.write_json(path, rows)
    store.finish(folder, inputs)
    return rows
