"""What a method of steering is, and how the methods of a config are made.

A method is a class with one way in, `answer`. Those of this package have names; any other is `module:Class`.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mavis_dist.compare.workspace import Workspace
from mavis_dist.sections import Compare
from mavis_dist.types import Prompt, UserError, one_line

BASE = "base"
NAMED: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # name -> class and settings
    BASE: ("mavis_dist.compare.sampling:Base", {}),
    "prompt": ("mavis_dist.compare.prompted:OnePrompt", {}),
    "mato": ("mavis_dist.compare.prompted:Mato", {}),
    "linear_alignment": ("mavis_dist.compare.prompted:Mato", {"preset": "linear_alignment"}),
    "context_steering": ("mavis_dist.compare.prompted:Mato", {"preset": "context_steering"}),
    "amulet": ("mavis_dist.compare.prompted:Mato", {"preset": "amulet"}),
    "best_of_n": ("mavis_dist.compare.sampling:BestOfN", {}),
    "best_of_n_value": ("mavis_dist.compare.sampling:BestOfNByValue", {}),
    "sir": ("mavis_dist.compare.sampling:ImportanceResampling", {}),
    "mavis": ("mavis_dist.compare.tilted:Mavis", {}),
    "mavis_full": ("mavis_dist.compare.tilted:Mavis", {"scorer": "full"}),
    "mavis_predicted": ("mavis_dist.compare.tilted:Mavis", {"scorer": "predicted"}),
    "mavis_qhead": ("mavis_dist.compare.tilted:Mavis", {"scorer": "qhead"}),
    "mavis_best_of_2": ("mavis_dist.compare.tilted:Mavis", {"n": 2}),
}
DEFAULT = (BASE, "prompt", "mato", "best_of_n", "best_of_n_value", "sir", "mavis", "mavis_best_of_2")


@dataclass(frozen=True)
class Answer:
    """One answer and what it took."""

    text: str
    num_tokens: int  # of this answer
    divergence: float | None  # KL of the method's policy from the base model's on this prompt, nats; None: unknown
    generated: int  # tokens generated in all, those of discarded answers included
    reward_calls: int = 0  # answers that a reward scored to choose among them, times objectives
    seconds: float = 0.0  # its share of the time in a full batch, calls of rewards left out


@dataclass(frozen=True)
class Training:
    """What comes before the first answer of a method."""

    seconds: float = 0.0
    tokens: int = 0  # that models generated to learn from
    machines: frozenset[str] = frozenset()  # where, as far as that is known (`models.hardware`)


class Method(ABC):
    """One way of steering; the constructor is quick, and models are loaded by the first answer."""

    strengths: tuple[float, ...] = (1.0,)  # the grid that it is tuned over, ascending in divergence
    is_steered: ClassVar[bool] = True  # False: the same answers for all weights and strengths
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # its settings

    def __init__(self, workspace: Workspace, settings: Mapping[str, Any]):
        self.workspace, self.settings = workspace, {**self.defaults, **settings}

    def check(self) -> None:  # noqa: B027
        """Raises UserError if it cannot answer, such as for a model that is missing; before anything expensive."""

    def covers(self, weights: Mapping[str, float]) -> bool:
        """Whether it can answer under these weights; False where that needs a model of exactly these."""
        return True

    def inputs(self) -> Mapping[str, Any]:
        """Plain values that its answers depend on besides prompts, weights, strength, seed and settings."""
        return {}

    def training(self) -> Training:
        """What it took to train what it steers with, for all weights that are compared."""
        return Training()

    def training_for(self, weights: Mapping[str, float]) -> Training:
        """The same for these weights alone; less than for all only where something is trained for exactly one."""
        return self.training()

    @abstractmethod
    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        """One answer to every prompt. The same arguments give the same texts.

        Args:
            weights: by objective, positive, with the sum 1; empty if the method is not steered.
        """


def make_methods(compare: Compare, workspace: Workspace) -> dict[str, Method]:
    """The methods of a config by name, checked; the base model is the first.

    Raises:
        UserError: naming the setting, its value and the remedy.
    """
    chosen = compare.methods or {name: {} for name in DEFAULT}
    chosen = {BASE: chosen.get(BASE, {}), **chosen}
    methods = {name: _make(name, settings, workspace) for name, settings in chosen.items()}
    for name, method in methods.items():
        try:
            method.check()
        except UserError as error:
            raise UserError(f"compare.methods.{name}: {error}") from None
    return methods


def _make(name: str, given: Mapping[str, Any], workspace: Workspace) -> Method:
    settings, key = dict(given), f"compare.methods.{name}"
    wanted = settings.pop("method", name)
    path, preset = NAMED.get(wanted, (wanted, {}))
    kind = _find(path, key)
    strengths = settings.pop("strengths", kind.strengths)
    if unknown := sorted(settings.keys() - kind.defaults.keys()):
        known = ", ".join(["method", "strengths", *kind.defaults])
        raise UserError(f"config key '{key}.{unknown[0]}' is unknown: its settings are {known}")
    method = kind(workspace, {**preset, **settings})
    method.strengths = _checked(strengths, f"{key}.strengths") if kind.is_steered else (0.0,)
    return method


def _find(path: str, key: str) -> type[Method]:
    module, colon, name = str(path).partition(":")
    if not colon:
        raise UserError(f"config key {key!r}: there is no method {path!r}; use {', '.join(NAMED)}, or module:Class")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config key '{key}.method' is {path!r}, which cannot be imported ({one_line(error)}): put its module on "
            "PYTHONPATH or beside the job"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"config key '{key}.method' is {path!r}: it must be a subclass of {__name__}.Method")
    return kind


def _checked(strengths: Any, key: str) -> tuple[float, ...]:
    is_list = isinstance(strengths, (list, tuple)) and len(strengths) > 0
    numbers = [x for x in strengths if isinstance(x, (int, float)) and math.isfinite(x) and x > 0] if is_list else []
    if not is_list or len(numbers) < len(strengths) or sorted(set(numbers)) != numbers:
        raise UserError(f"config key {key!r} is {strengths!r}: use different numbers above 0, in ascending order")
    return tuple(map(float, numbers))
