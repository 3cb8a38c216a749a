"""Prompts from the built-in set, a file, or a Hugging Face data set, before any chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mavis_dist.sections import Prompts
from mavis_dist.types import Prompt, UserError

BUILTIN = Path(__file__).parent / "data" / "prompts.jsonl"


class PromptError(UserError):
    """Prompts that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Pool:
    """The rows of a table in one split."""

    name: str  # of the split; "row" in a file without splits
    table: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]  # of its rows in the table


def load_prompts(prompts: Prompts, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts, `prompts.train` and `prompts.evaluation` many.

    The built-in set is taken in file order; every other source is shuffled by `seed`. A .jsonl or .parquet file is one
    pool of rows unless it has a column `split`. No evaluation prompt has the text of a training prompt. Ids come from
    the column `id`, else they are `{split}-{row}`, or `row-{row}` in a file without splits.

    Raises:
        PromptError: naming the source, row or key and the remedy.
    """
    train_pool, eval_pool = _pool(prompts, prompts.train_split), _pool(prompts, prompts.eval_split)
    train_rows = _draw(prompts, train_pool, seed)
    # One iterator over a shared pool hands out every row once.
    eval_rows = train_rows if train_pool.name == eval_pool.name else _draw(prompts, eval_pool, seed)
    train = _take(prompts, train_rows, "train")
    seen = {prompt.text for prompt in train}
    evaluation = _take(prompts, (prompt for prompt in eval_rows if prompt.text not in seen), "evaluation")
    _check_ids(prompts.source, [*train, *evaluation])
    return train, evaluation


def held_out(prompts: Prompts, train: Sequence[Prompt]) -> list[Prompt]:
    """The last training prompts, whose trees validate the value models and do not train them."""
    return list(train[len(train) - prompts.validation :])


def _pool(prompts: Prompts, split: str) -> Pool:
    pool = _read(prompts, split)
    if not len(pool.table):
        raise PromptError(f"prompts.source {prompts.source!r} has no rows: choose another source")
    columns = _columns(pool.table)
    if prompts.field not in columns:
        raise PromptError(
            f"prompts.source {prompts.source!r} has no column {prompts.field!r}: "
            f"set prompts.field to one of {', '.join(columns)}"
        )
    return pool


def _read(prompts: Prompts, split: str) -> Pool:
    source = prompts.source
    path = BUILTIN if source == "builtin" else Path(source).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        rows = _read_dataset(prompts, source, split=split, name=prompts.subset)
        return Pool(split, rows, range(len(rows)))
    if not path.is_file():
        raise PromptError(f"prompts.source {str(path)!r} does not exist: give an existing .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        table = _read_jsonl(path)
    else:
        table = _read_dataset(prompts, "parquet", data_files=str(path), split="train")
    if "split" not in _columns(table):
        return Pool("row", table, range(len(table)))
    splits = [row.get("split") for row in table]
    if split not in splits:
        known = ", ".join(sorted({str(name) for name in splits}))
        raise PromptError(
            f"prompts.source {source!r} has no split {split!r}: "
            f"set prompts.train_split and prompts.eval_split to {known}"
        )
    return Pool(split, table, [number for number, name in enumerate(splits) if name == split])


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts.source {str(path)!r} is not UTF-8 text ({error.reason}): convert it") from None
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"line {number} of {str(path)!r} is not JSON ({error.msg}): correct the line") from None
    if not isinstance(row, dict):
        raise PromptError(f"line {number} of {str(path)!r} is not a JSON object: write one object per line")
    return row


def _read_dataset(prompts: Prompts, path: str, **options: Any) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(path, **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(" .:")
        raise PromptError(
            f"prompts.source {prompts.source!r} cannot be read with split {options['split']!r} ({reason}): "
            f"check the source, the network, prompts.subset and the names of the splits"
        ) from error


def _columns(table: Any) -> list[str]:
    return getattr(table, "column_names", None) or list(dict.fromkeys(key for row in table for key in row))


def _draw(prompts: Prompts, pool: Pool, seed: int) -> Iterator[Prompt]:
    """All prompts of a pool, in the order of use."""
    numbers = list(pool.numbers)
    if prompts.source != "builtin":
        random.Random(f"{seed}/{pool.name}").shuffle(numbers)
    for number in numbers:
        row = pool.table[number]
        text = row.get(prompts.field)
        if not isinstance(text, str) or not text.strip():
            raise PromptError(
                f"row {number} of prompts.source {prompts.source!r} has {text!r:.80} in column {prompts.field!r}: "
                f"every prompt must be a non-empty text"
            )
        yield Prompt(str(row.get("id", f"{pool.name}-{number}")), text)


def _take(prompts: Prompts, rows: Iterable[Prompt], key: str) -> list[Prompt]:
    wanted = getattr(prompts, key)
    taken = list(islice(rows, wanted))
    if len(taken) < wanted:
        raise PromptError(
            f"prompts.source {prompts.source!r} has only {len(taken)} prompts for prompts.{key}={wanted}"
            f"{' that training does not use' if key == 'evaluation' else ''}: lower prompts.{key}"
        )
    return taken


def _check_ids(source: str, drawn: list[Prompt]) -> None:
    ids: set[str] = set()
    for prompt in drawn:
        if prompt.id in ids:
            raise PromptError(f"prompts.source {source!r} has the id {prompt.id!r} twice: make the column id unique")
        ids.add(prompt.id)
