"""Cells of a comparison: one method with weights, strength and seed, answering all prompts; a parquet file each.

The name of a file depends on everything that the answers depend on, so a finished cell is never computed again, and no
cell is mistaken for another.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mavis_dist.compare.method import Answer, Method
from mavis_dist.compare.text_quality import Surprise
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.models.hardware import device_name
from mavis_dist.run_state import answer_params
from mavis_dist.store import layout
from mavis_dist.store.files import DamagedFile, Store, digest
from mavis_dist.types import Prompt, UserError

Weights = tuple[tuple[str, float], ...]  # by objective, positive, in the order of the config; the sum is 1
SURPRISE_PROMPTS = 32  # for the perplexity, with the first seed: all of them would take longer than decoding
REWARD = "reward/"  # begins the names of columns with an objective's raw rewards
SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "text": pa.string(),
        "num_tokens": pa.int32(),
        "divergence": pa.float64(),
        "generated": pa.int32(),
        "reward_calls": pa.int32(),
        "seconds": pa.float64(),
        "surprise": pa.float64(),  # nats under the base model
        "surprise_tokens": pa.int32(),  # whose surprise it is; 0: not measured
        "machine": pa.string(),  # that decoded: the processor or GPU
    }
)


@dataclass(frozen=True)
class Cell:
    """One method with its weights, strength and seed."""

    method: str
    weights: Weights
    strength: float
    seed: int
    path: str

    @property
    def name(self) -> str:
        return f"{self.method}, {weights_name(self.weights)}, strength {self.strength:g}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Answers:
    """All answers of a cell; arrays are [P], in the order of the prompts."""

    text: list[str]
    num_tokens: np.ndarray
    divergence: np.ndarray  # nats; nan: unknown
    generated: np.ndarray
    reward_calls: np.ndarray
    seconds: np.ndarray
    surprise: np.ndarray
    surprise_tokens: np.ndarray
    reward: dict[str, np.ndarray]  # by objective, in the reward's own unit
    machine: str = ""  # that decoded; "": unknown


def weights_name(weights: Weights) -> str:
    return " + ".join(name if weight == 1 else f"{weight:.2g} {name}" for name, weight in weights) or "base"


def weight_vectors(objectives: Sequence[str], steps: int) -> list[Weights]:
    """Every objective alone, then the inner points of pairs and triples of a lattice with `steps` points per edge."""
    parts = steps - 1
    found: list[Weights] = [((name, 1.0),) for name in objectives]
    for size in (2, 3):
        for names in combinations(objectives, size):
            found += [tuple(zip(names, (n / parts for n in shares), strict=True)) for shares in _sums(parts, size)]
    return found


def _sums(total: int, size: int) -> Iterator[tuple[int, ...]]:
    """All tuples of positive integers with this sum, the first one descending."""
    if size == 1:
        yield (total,)
        return
    for first in range(total - size + 1, 0, -1):
        yield from ((first, *rest) for rest in _sums(total - first, size - 1))


def plan_cells(
    config: Config, methods: Mapping[str, Method], prompts: Sequence[Prompt], base_fingerprint: str
) -> list[Cell]:
    """All cells, those of a method one after the other; raises UserError for a method without any."""
    vectors = weight_vectors(list(config.objectives), config.compare.weights)
    common: dict[str, Any] = {
        "base": config.base.model_dump(mode="json", exclude={"device", "model"}),
        "base_model": base_fingerprint,
        "prompts": [prompt.text for prompt in prompts],
        "params": asdict(answer_params(config, 1)),
        "rewards": {name: spec.model_dump(mode="json") for name, spec in config.objectives.items()},
    }
    cells = []
    for name, method in methods.items():
        own_vectors = [weights for weights in vectors if method.covers(dict(weights))] if method.is_steered else [()]
        if not own_vectors:
            raise UserError(
                f"compare.methods.{name} covers none of the weights: change compare.weights, or leave it out"
            )
        kind = f"{type(method).__module__}:{type(method).__qualname__}"
        own = {**common, "method": kind, "settings": method.settings, "inputs": dict(method.inputs())}
        for seed in range(config.compare.seeds):
            for weights in own_vectors:
                for strength in method.strengths:
                    path = _path(own, name, weights, strength, seed)
                    cells.append(Cell(name, weights, strength, seed, path))
    return cells


def _path(inputs: Mapping[str, Any], method: str, weights: Weights, strength: float, seed: int) -> str:
    key = digest({**inputs, "weights": dict(weights), "strength": strength, "seed": seed})
    shares = "-".join(f"{weight:.2g}-{name}" for name, weight in weights) or "any"
    return layout.cell_file(f"{method}-{shares}-{strength:g}-s{seed}-{key}")


def compute(cell: Cell, method: Method, prompts: Sequence[Prompt], workspace: Workspace) -> None:
    """Answer all prompts, score the answers and store them."""
    answers = method.answer(prompts, dict(cell.weights), cell.strength, cell.seed)
    texts = [answer.text for answer in answers]
    rewards = {name: workspace.score(name, prompts, texts) for name in workspace.config.objectives}
    some = list(prompts[:SURPRISE_PROMPTS]) if cell.seed == 0 else []
    surprises = workspace.surprise(some, texts[: len(some)])
    surprises += [Surprise(0.0, 0)] * (len(prompts) - len(some))
    machine = device_name(workspace.config.base.device)
    write(workspace.store, cell.path, prompts, answers, rewards, surprises, machine)


def write(
    store: Store,
    path: str,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    rewards: Mapping[str, Sequence[float]],
    surprises: Sequence[Surprise],
    machine: str,
) -> None:
    """Store the answers to all prompts as one whole file."""
    rows = [
        {"prompt_id": prompt.id, **asdict(answer), "surprise": one.nats, "surprise_tokens": one.num_tokens}
        for prompt, answer, one in zip(prompts, answers, surprises, strict=True)
    ]
    table = pa.Table.from_pylist([{**row, "machine": machine} for row in rows], schema=SCHEMA)
    for name, scores in rewards.items():
        table = table.append_column(f"{REWARD}{name}", pa.array(scores, pa.float64()))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes(path, buffer.getvalue())


def read(store: Store, cell: Cell, prompts: Sequence[Prompt]) -> Answers:
    """The stored answers of a finished cell; raises StoreError if the file is damaged."""
    data = store.read_bytes(cell.path)
    try:
        table = pq.read_table(io.BytesIO(data))
        assert table["prompt_id"].to_pylist() == [prompt.id for prompt in prompts]
        return answers_of(table)
    except (pa.ArrowException, AssertionError, KeyError) as error:
        raise DamagedFile(f"{store.root}/{cell.path} is damaged ({error}): delete it and run again") from None


def answers_of(table: pa.Table) -> Answers:
    """The answers in the rows of a table; raises KeyError if it lacks a column."""
    columns = {name: table[name].to_numpy() for name in SCHEMA.names if name not in ("prompt_id", "text", "machine")}
    rewards = {name for name in table.column_names if name.startswith(REWARD)}
    reward = {name.removeprefix(REWARD): table[name].to_numpy() for name in rewards}
    # Cells of older versions do not say where they were computed.
    machine = table["machine"][0].as_py() if "machine" in table.column_names else ""
    return Answers(text=table["text"].to_pylist(), **columns, reward=reward, machine=machine)
