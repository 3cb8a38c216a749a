"""The user's own Python function as a reward."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from mavis_dist.rewards.protocol import RewardError


class Function:
    """`module:function`, called as function(prompts, answers) with two lists of strings."""

    def __init__(self, path: str) -> None:
        self.function = _find(path)

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return self.function(list(prompts), list(answers))


def _find(path: str) -> Any:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(
            f"reward function {path!r} cannot be imported ({error}): put its module on PYTHONPATH or beside the job"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no such name" if function is None else f"an object of type {type(function).__name__}"
        raise RewardError(f"reward function {path!r} is not callable: module {module_name!r} has {found} there")
    return function
