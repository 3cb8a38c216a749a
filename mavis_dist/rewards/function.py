"""The user's own Python function as a reward."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mavis_dist.rewards.protocol import RewardError
from mavis_dist.types import one_line


class Function:
    """`module:function`, called as function(prompts, answers) with two lists of strings."""

    def __init__(self, path: str) -> None:
        """Raises RewardError if there is no such function, or it cannot be called so."""
        self.path, self.function = path, _find(path)
        if inspect.isclass(self.function):
            raise RewardError(
                f"reward function {path!r} is a class: name a function or an instance of it that takes (prompts, "
                f"answers), such as {path.partition(':')[0]}:score with `score = {self.function.__name__}(...)`"
            )
        if inspect.iscoroutinefunction(self.function):
            raise RewardError(f"reward function {path!r} is asynchronous: make it an ordinary function (def)")
        try:
            inspect.signature(self.function).bind([], [])
        except TypeError as error:
            raise RewardError(
                f"reward function {path!r} cannot be called as function(prompts, answers) ({error}): let it take these "
                "two lists"
            ) from None
        except ValueError:  # one in C may not tell its signature
            pass

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Raises RewardError for whatever the function raises."""
        try:
            scores = self.function(list(prompts), list(answers))
            return list(scores) if isinstance(scores, Iterator) else scores
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"reward function {self.path!r} raised {_described(error)} for {_counted(answers)}: correct it"
            ) from error


def _find(path: str) -> Any:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module raises
        what = error if isinstance(error, ImportError) else _described(error)
        raise RewardError(
            f"reward function {path!r} cannot be imported ({one_line(what)}): put its module on PYTHONPATH or beside "
            "the job, and let it import without errors"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no such name" if function is None else f"an object of type {type(function).__name__}"
        raise RewardError(f"reward function {path!r} is not callable: module {module_name!r} has {found} there")
    return function


def _described(error: BaseException) -> str:
    """Type, message and place of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} ({one_line(error)}{place})"


def _counted(answers: Sequence[str]) -> str:
    if len(answers) == 1:
        return f"the answer {answers[0][:40]!r}"
    return f"{len(answers)} answers"
