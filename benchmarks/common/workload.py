"""Models of a finished run, and requests for prompts that it was not trained on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import yaml

from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.decode import Request, SamplingParams, Scorer
from mavis_dist.decode.load_guide import fetch_published, load_models, load_students
from mavis_dist.models import value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.models.qhead import Student
from mavis_dist.models.value import ValueModel
from mavis_dist.prompts import load_prompts
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.types import UserError

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Workload:
    """Models and prompts."""

    config: Config
    base: BaseModel
    objectives: tuple[str, ...]  # the two that are measured
    models: dict[str, ValueModel]  # four: each of the two is loaded twice, to stand for four models
    prompts: list[tuple[int, ...]]  # token ids of the evaluation prompts
    students: dict[str, tuple[Student, int]]  # of the two objectives, if a distilled model is published

    @cached_property
    def endless(self) -> BaseModel:
        """The base model with an unused end-of-answer token, so that every answer has max_tokens tokens."""
        unused = max(self.base.tokenizer.added_tokens_decoder)
        assert unused not in self.base.eos_ids
        return replace(self.base, eos_ids=(unused,))

    def requests(
        self,
        count: int,
        weights: Sequence[dict[str, float]],
        max_tokens: int,
        scorer: Scorer = Scorer.FULL,
        cap: float | None = None,
        residual_cap: float | None = None,
    ) -> list[Request]:
        """One request per prompt, each with its own seed; `weights` are used cyclically."""
        return [
            Request(
                id=str(i),
                prompt=prompt,
                weights=weights[i % len(weights)],
                beta=self.config.steer.beta,
                tilt_cap=cap,
                params=SamplingParams(max_tokens, seed=i),
                scorer=scorer,
                residual_cap=residual_cap,
            )
            for i, prompt in enumerate(self.prompts[:count])
        ]


def weight_settings(objectives: Sequence[str]) -> list[dict[str, float]]:
    """Four different settings of the objectives' weights."""
    return [{name: 1.0 + (i + m) % 4 for m, name in enumerate(objectives)} for i in range(4)]


def open_run(run: Path) -> tuple[Config, Store]:
    """The config and the store of a run; raises UserError if it is missing or not finished."""
    store = Store(str(run.parent), run.name)
    if not store.exists(layout.CONFIG_FILE) or len(values.published(store)) < 2:
        raise UserError(f"{run} is not a finished run with two objectives: run `make quickstart` first")
    return config_module.parse(yaml.safe_load(store.read_bytes(layout.CONFIG_FILE))), store


@contextmanager
def without_distilled(run: Path) -> Iterator[Path]:
    """A temporary copy of a run in which each of two objectives has its own value model.

    Objectives of a distilled model share it inside a base replica but not across value replicas, so the two placements
    would do different work.
    """
    config, store = open_run(run)
    published = values.published(store)
    with tempfile.TemporaryDirectory(prefix="mavis-") as folder:
        copy = Path(folder) / run.name
        for name in _first_two(config, published):
            own = layout.value_folder(name, published[name])
            for path in {own, values.model_folder(store, own)}:
                shutil.copytree(run / path, copy / path, dirs_exist_ok=True)
            values.publish(Store(folder, run.name), name, published[name])
        yield copy


def load(run: Path) -> Workload:
    """Raises UserError if the run is missing or not finished."""
    config, store = open_run(run)
    published = values.published(store)
    base = load_base(config.base.model, DTYPE)
    objectives = _first_two(config, published)
    models = {}
    for copy in ("", "_again"):
        for name in objectives:
            folder = values.fetch(store, name, published[name])
            models[name + copy], card = value.load_objective(folder, name, getattr(torch, DTYPE), base=base)
            card.check(base.fingerprint, base.tokenizer_fingerprint)
    students = _students(store, objectives, base)
    return Workload(config, base, objectives, models, _evaluation_prompts(config, base), students)


def _first_two(config: Config, published: Collection[str]) -> tuple[str, ...]:
    """The first two objectives of the config that have a value model."""
    return tuple(name for name in config.objectives if name in published)[:2]


def _students(store: Store, objectives: Sequence[str], base: BaseModel) -> dict[str, tuple[Student, int]]:
    published = {name: folder for name, folder in fetch_published(store).items() if name in objectives}
    folders = {name: folder for name, folder in published.items() if value.load_card(folder).teachers}
    return load_students(folders, load_models(folders, getattr(torch, DTYPE), base=base))


def _evaluation_prompts(config: Config, base: BaseModel) -> list[tuple[int, ...]]:
    _, prompts = load_prompts(config.prompts, config.seed)
    return [base.chat(prompt.messages, config.base.system) for prompt in prompts]
