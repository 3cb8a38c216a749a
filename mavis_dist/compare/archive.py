"""A comparison in one file: all answers and what figures need besides, so that tables come without run and models.

A parquet file with a row per answer; what is not by answer stands in its schema's metadata, as JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mavis_dist.compare.cells import REWARD, SCHEMA, Answers, Cell, answers_of
from mavis_dist.compare.measured import Measured
from mavis_dist.compare.results import TrainingCost
from mavis_dist.types import Prompt, RewardScale, UserError

KEY = b"mavis_dist.comparison"
CELL = pa.schema(
    {"method": pa.string(), "weights": pa.string(), "strength": pa.float64(), "seed": pa.int32(), "path": pa.string()}
)


@dataclass(frozen=True, eq=False)
class Collected:
    """Everything that the figures of a comparison are computed from."""

    measured: Measured
    prompts: list[Prompt]
    training: Mapping[str, TrainingCost]  # by method
    conditions: Mapping[str, str]  # topic -> one line of text


def save(collected: Collected, file: Path) -> None:
    """Write all answers to a file."""
    measured = collected.measured
    ids = [prompt.id for prompt in collected.prompts]
    tables = [_table(cell, answers, ids) for cell, answers in measured.cells.items()]
    about = {
        "prompts": [{"id": prompt.id, "text": prompt.text} for prompt in collected.prompts],
        "scales": {name: asdict(scale) for name, scale in measured.scales.items()},
        "base": {name: rewards.tolist() for name, rewards in measured.base_PN.items()},
        "kl": measured.kl,
        "training": {name: asdict(cost) for name, cost in collected.training.items()},
        "conditions": dict(collected.conditions),
    }
    table = pa.concat_tables(tables).replace_schema_metadata({KEY: json.dumps(about).encode()})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, compression="zstd")


def load(files: Sequence[Path]) -> Collected:
    """The comparison of a file, or of several that were measured on the same prompts: their methods side by side.

    Of a cell that several files have, the first one counts: its answers may be from another machine.

    Raises:
        UserError: a file is missing or none of these, or two of them do not belong together.
    """
    first, *others = [_read(file) for file in files]
    cells, training = dict(first.measured.cells), dict(first.training)
    for file, other in zip(files[1:], others, strict=True):
        if difference := _difference(first, other) or _changed(cells, other.measured.cells):
            raise UserError(f"{files[0]} and {file} are about other {difference}: give files of the same comparison")
        cells |= {cell: answers for cell, answers in other.measured.cells.items() if cell not in cells}
        training |= {method: cost for method, cost in other.training.items() if method not in training}
    one = first.measured
    measured = Measured(dict(sorted(cells.items(), key=_by_method(cells))), one.base_PN, one.scales, one.kl)
    return Collected(measured, first.prompts, training, first.conditions)


def _by_method(cells: Mapping[Cell, Answers]) -> Any:
    """The order in which methods come first: the cells of a method stand together."""
    order = {method: number for number, method in enumerate(dict.fromkeys(cell.method for cell in cells))}
    return lambda item: order[item[0].method]


def _table(cell: Cell, answers: Answers, ids: Sequence[str]) -> pa.Table:
    own = {"method": cell.method, "weights": json.dumps(cell.weights), "strength": cell.strength}
    same = {**own, "seed": cell.seed, "path": cell.path}
    columns: dict[str, Any] = {name: pa.array([same[name]] * len(ids), CELL.field(name).type) for name in CELL.names}
    columns["prompt_id"] = pa.array(ids)
    own_columns = {**vars(answers), "machine": [answers.machine] * len(ids)}
    for name in SCHEMA.names[1:]:
        columns[name] = pa.array(own_columns[name], SCHEMA.field(name).type)
    rewards = {f"{REWARD}{name}": pa.array(answers.reward[name]) for name in sorted(answers.reward)}
    return pa.table({**columns, **rewards})


def _read(file: Path) -> Collected:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a file of jobs.evaluate --answers") from None
    try:
        table = pq.read_table(io.BytesIO(data))
        return _collected(table, json.loads(table.schema.metadata[KEY]))
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of jobs.evaluate --answers ({error})") from None


def _collected(table: pa.Table, about: Mapping[str, Any]) -> Collected:
    prompts = [Prompt(**prompt) for prompt in about["prompts"]]
    size = len(prompts)
    cells = dict(_cell(table.slice(start, size)) for start in range(0, len(table), size))
    scales = {name: RewardScale(**scale) for name, scale in about["scales"].items()}
    base = {name: np.array(rewards) for name, rewards in about["base"].items()}
    training = {name: TrainingCost(**fields) for name, fields in about["training"].items()}
    return Collected(Measured(cells, base, scales, about["kl"]), prompts, training, about["conditions"])


def _cell(table: pa.Table) -> tuple[Cell, Answers]:
    same = {name: table[name][0].as_py() for name in CELL.names}
    weights = tuple((name, share) for name, share in json.loads(same.pop("weights")))
    return Cell(weights=weights, **same), answers_of(table)


def _difference(one: Collected, other: Collected) -> str | None:
    """What two comparisons differ in so that their methods cannot stand side by side."""
    if one.prompts != other.prompts:
        return "prompts"
    if one.measured.scales != other.measured.scales:
        return "objectives or scales of their rewards"
    if any(not np.array_equal(rewards, other.measured.base_PN[name]) for name, rewards in one.measured.base_PN.items()):
        return "answers of the base model"
    return None if one.measured.kl == other.measured.kl else "divergences (compare.kl)"


def _changed(cells: Mapping[Cell, Answers], others: Mapping[Cell, Answers]) -> str | None:
    """Methods whose answers depend on something else in the others, which would pass for further seeds."""
    paths = {replace(cell, path=""): cell.path for cell in cells}
    methods = {cell.method for cell in others if paths.get(replace(cell, path=""), cell.path) != cell.path}
    return f"answers of {', '.join(sorted(methods))}" if methods else None
