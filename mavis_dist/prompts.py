"""Prompts from the built-in set, a file, or a Hugging Face data set, before any chat template."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mavis_dist.sections import Prompts
from mavis_dist.types import Prompt, UserError, one_line, text_fault

BUILTIN = Path(__file__).parent / "data" / "prompts.jsonl"
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}  # of the package datasets
# Who speaks, under the names that data sets use.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
LABELS = {"user": "Human", "assistant": "Assistant"}  # of dialogues, as in HH-RLHF
LABEL = "(Human|Assistant):"

Turn = tuple[str, str]  # role and text


class PromptError(UserError):
    """Prompts that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Pool:
    """The rows of a table in one split."""

    name: str  # of the split; "row" in a file without splits
    table: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]  # of its rows in the table


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run. No two of them have the same text."""

    source: str
    train: list[Prompt]  # the last of them validate
    evaluation: list[Prompt]
    rows: Mapping[str, str]  # id -> where the prompt stands in its source
    repeated: Mapping[str, int]  # train, evaluation -> rows passed over because a prompt before has their text

    def where(self, prompt: Prompt) -> str:
        """The row of a prompt, its source and its id, for messages."""
        return f"{self.rows[prompt.id]} of prompts.source {self.source!r} (id {prompt.id!r})"

    @property
    def left_out(self) -> str | None:
        """One line on the rows that were passed over; None if there were none."""
        counts = [f"{count} for prompts.{key}" for key, count in self.repeated.items() if count]
        if not counts:
            return None
        return f"left out because another prompt has their text (case and spaces apart): {', '.join(counts)}"


def load_prompts(prompts: Prompts, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts as in `draw_prompts`."""
    drawn = draw_prompts(prompts, seed)
    return drawn.train, drawn.evaluation


def draw_prompts(prompts: Prompts, seed: int) -> PromptSet:
    """The prompts of a run, `prompts.train` and `prompts.evaluation` many.

    The built-in set is taken in file order; every other source is shuffled by `seed`. A .jsonl or .parquet file is one
    pool of rows unless it has a column `split`. Every text is used once, for training, validation or evaluation: rows
    that repeat one (`same_text`) are passed over. Ids come from the column `id`, else they are `{split}-{row}`, or
    `row-{row}` in a file without splits; rows count from 0.

    Raises:
        PromptError: naming the source, row or key and the remedy.
    """
    train_pool, eval_pool = _pool(prompts, prompts.train_split), _pool(prompts, prompts.eval_split)
    train_rows = _draw(prompts, train_pool, seed)
    # One iterator over a shared pool hands out every row once.
    eval_rows = train_rows if train_pool.name == eval_pool.name else _draw(prompts, eval_pool, seed)
    seen: set[str] = set()
    train, repeated_train = _take(prompts, train_rows, "train", seen)
    evaluation, repeated_evaluation = _take(prompts, eval_rows, "evaluation", seen)
    drawn = [*train, *evaluation]
    _check_ids(prompts.source, [prompt for _, prompt in drawn])
    return PromptSet(
        source=prompts.source,
        train=[prompt for _, prompt in train],
        evaluation=[prompt for _, prompt in evaluation],
        rows={prompt.id: row for row, prompt in drawn},
        repeated={"train": repeated_train, "evaluation": repeated_evaluation},
    )


def same_text(text: str) -> str:
    """What two texts have in common that count as the same: Unicode's compatible characters, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


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
    if path.suffix not in BUILDERS:
        rows = _read_dataset(prompts, source, split=split, name=prompts.subset)
        return Pool(split, rows, range(len(rows)))
    is_remote = "://" in source
    if not is_remote and not path.is_file():
        raise PromptError(f"prompts.source {str(path)!r} does not exist: give an existing .jsonl or .parquet file")
    if path.suffix == ".jsonl" and not is_remote:
        table = _read_jsonl(path)
    else:
        file = source if is_remote else str(path)
        table = _read_dataset(prompts, BUILDERS[path.suffix], data_files=file, split="train")
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
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
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
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it is a loading script
        raise PromptError(
            f"prompts.source {prompts.source!r} cannot be read with split {options['split']!r} ({one_line(error)}): "
            f"check the source, the network, prompts.subset and the names of the splits"
        ) from error


def _columns(table: Any) -> list[str]:
    """The columns, those inside of others with dotted names."""
    features = getattr(table, "features", None)
    rows = table if features is None else [features]
    return list(dict.fromkeys(name for row in rows for name in _names(row)))


def _names(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _value(row: Any, field: str) -> Any:
    """What a column holds, or a dotted name inside of one; None if there is nothing."""
    if not isinstance(row, Mapping):
        return None
    if field in row:
        return row[field]
    outer, _, inner = field.partition(".")
    return _value(row.get(outer), inner) if inner else None


def _draw(prompts: Prompts, pool: Pool, seed: int) -> Iterator[tuple[str, Prompt]]:
    """All prompts of a pool, with their rows in words, in the order of use."""
    numbers = list(pool.numbers)
    if prompts.source != "builtin":
        random.Random(f"{seed}/{pool.name}").shuffle(numbers)
    for number in numbers:
        place = f"row {number}" if pool.name == "row" else f"row {number} of split {pool.name!r}"
        try:
            row = pool.table[number]
        except UnicodeDecodeError as error:
            raise PromptError(
                f"{place} of prompts.source {prompts.source!r} is not UTF-8 ({error.reason}): correct or remove it"
            ) from None
        id_ = f"{pool.name}-{number}" if row.get("id") is None else str(row["id"])
        value = _value(row, prompts.field)
        try:
            turns = FORMATS[prompts.format](value)
            for text in (id_, *(text for _, text in turns)):
                if fault := text_fault(text):
                    raise ValueError(f"it holds {fault}: correct or remove the row")
        except ValueError as error:
            raise PromptError(
                f"{place} of prompts.source {prompts.source!r} (id {id_!r}) has {value!r:.80} in column "
                f"{prompts.field!r}: {error}"
            ) from None
        yield place, _prompt(id_, turns)


def _prompt(id_: str, turns: Sequence[Turn]) -> Prompt:
    """A question, or a conversation whose text is all that was said, labelled from its second turn on.

    So it continues `Human: `, as a single question does, in the template of a reward.
    """
    if len(turns) == 1:
        return Prompt(id_, turns[0][1])
    said = "\n\n".join(f"{LABELS[role]}: {text}" for role, text in turns if role in LABELS)
    return Prompt(id_, said.removeprefix(f"{LABELS['user']}: "), tuple(turns))


def _question(value: Any) -> list[Turn]:
    """A plain text is the question; raises ValueError with the remedy, as the other formats do."""
    if isinstance(value, (list, Mapping)):
        raise ValueError("every prompt must be a text; set prompts.format=conversation for lists of messages")
    if not isinstance(value, str) or not _is_visible(value):
        raise ValueError("every prompt must be a non-empty text")
    if re.match(rf"\s*{LABEL}", value) and re.search(r"\n\s*Assistant:", value):
        raise ValueError("this is a dialogue with its answers; set prompts.format=dialogue")
    return [("user", value)]


def _dialogue(value: Any) -> list[Turn]:
    """`Human: ... Assistant: ...`; labels stand behind blank lines, or if none does, at the beginning of lines."""
    if not isinstance(value, str) or not re.match(rf"\s*{LABEL}", value):
        raise ValueError("a dialogue begins with Human: or Assistant:; set prompts.format=text for plain questions")
    text = value.replace("\r\n", "\n").strip()
    gap = "\n\n" if re.search(f"\n\n{LABEL}", text) else "\n"
    _, *pieces = re.split(f"(?:^|{gap}){LABEL}", text)
    turns: list[Turn] = []
    for label, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = "user" if label == LABELS["user"] else "assistant"
        before = turns.pop()[1] if turns and turns[-1][0] == role else ""  # templates want turns to alternate
        turns.append((role, f"{before}\n\n{said.strip()}".strip()))
    return _up_to_the_question(turns)


def _conversation(value: Any) -> list[Turn]:
    """A list of messages with `role` and `content`, or with ShareGPT's `from` and `value`."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError("a conversation is a list of messages; set prompts.format to text or dialogue for texts")
    return _up_to_the_question([_turn(message) for message in value])


def _turn(message: Mapping[str, Any]) -> Turn:
    name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"a message has the role {name!r:.40}: use system, user or assistant (role or from)")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise ValueError(f"the {role} message has no text: give one as content or value")
    return role, content


def _up_to_the_question(turns: Sequence[Turn]) -> list[Turn]:
    """Without the last answer, and whatever else follows the last question."""
    questions = [place for place, (role, text) in enumerate(turns) if role == "user" and _is_visible(text)]
    if not questions:
        raise ValueError("there is no question: correct or remove the row")
    return list(turns[: questions[-1] + 1])


def _is_visible(text: str) -> bool:
    """Whether there is anything but spaces, format and control characters."""
    return any(not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf") for character in text)


FORMATS: Mapping[str, Callable[[Any], list[Turn]]] = {
    "text": _question,
    "dialogue": _dialogue,
    "conversation": _conversation,
}


def _take(
    prompts: Prompts, rows: Iterable[tuple[str, Prompt]], key: str, seen: set[str]
) -> tuple[list[tuple[str, Prompt]], int]:
    """The next `prompts.{key}` rows whose texts are not among `seen`, to which they are added; and how many were."""
    wanted, repeated = getattr(prompts, key), 0
    taken: list[tuple[str, Prompt]] = []
    for row in rows:
        text = same_text(row[1].text)
        if text in seen:
            repeated += 1
            continue
        seen.add(text)
        taken.append(row)
        if len(taken) == wanted:
            return taken, repeated
    raise PromptError(
        f"prompts.source {prompts.source!r} has only {len(taken)} prompts for prompts.{key}={wanted}"
        f"{' that training does not use' if key == 'evaluation' else ''}"
        f"{f'; {repeated} rows repeat the text of another prompt' if repeated else ''}: lower prompts.{key}"
    )


def _check_ids(source: str, drawn: list[Prompt]) -> None:
    ids: set[str] = set()
    for prompt in drawn:
        if prompt.id in ids:
            raise PromptError(f"prompts.source {source!r} has the id {prompt.id!r} twice: make the column id unique")
        ids.add(prompt.id)
