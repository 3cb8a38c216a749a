"""Prompts from the built-in set, a file, or a Hugging Face data set, before any chat template."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from mavis_dist.sections import Prompts
from mavis_dist.types import Prompt, UserError, one_line, text_fault

BUILTIN = Path(__file__).parent / "data" / "prompts.jsonl"
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}  # of the package datasets
LEVELS = 16  # of columns inside of others that have names; JSON may have thousands
# Who speaks, under the names that data sets use.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
LABELS = {"user": "Human", "assistant": "Assistant"}  # of dialogues, as in HH-RLHF
LINE, BLANK_LINE = r"\n[^\S\n]*", r"\n[^\S\n]*\n[^\S\n]*"  # what stands before the labels of a dialogue
MARKS = r"[^\w\n]*"  # such as those of a heading
ANSWERS = "assistant|ai|bot|gpt|chatgpt"
FIRST_LABEL = re.compile(rf"\n{MARKS}(?:human|user|(assistant))\s*:", re.IGNORECASE)
HIDDEN_ANSWER = re.compile(rf"\bassistant\s*:|\n{MARKS}(?:{ANSWERS})\s*:", re.IGNORECASE)
WITH_ANSWERS = re.compile(
    rf"\W*(?:(?:human|user|system)\s*:.*?(?:\bassistant\s*:|^{MARKS}(?:{ANSWERS})\s*:)"
    rf"|assistant\s*:.*?^{MARKS}(?:human|user)\s*:)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)

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
    def sample(self) -> tuple[str, ...]:
        """Texts that rewards are tried on: one to train with and one to evaluate with."""
        return self.train[0].text, self.evaluation[0].text

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
        if path.is_file():
            raise PromptError(
                f"prompts.source {source!r} is neither a .jsonl file, with one JSON object per line, nor a .parquet "
                f"file: convert it to one of them"
            )
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
    names = [row.get("split") for row in table]
    splits = {number: str(name) for number, name in enumerate(names) if name is not None}
    if not splits:
        return Pool("row", table, range(len(table)))
    if split not in splits.values():
        raise PromptError(
            f"prompts.source {source!r} has no split {split!r}: "
            f"set prompts.train_split and prompts.eval_split to {', '.join(sorted(set(splits.values())))}"
        )
    return Pool(split, table, [number for number, name in splits.items() if name == split])


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts.source {str(path)!r} is not UTF-8 text ({error.reason}): convert it") from None
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    # Besides what is not JSON: integers of thousands of digits, and thousands of levels.
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise PromptError(f"line {number} of {str(path)!r} is not JSON ({reason}): correct the line") from None
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


def _names(row: Mapping[str, Any], prefix: str = "", levels: int = LEVELS) -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping) and levels > 1:
            yield from _names(value, f"{prefix}{name}.", levels - 1)


def _value(row: Any, field: str) -> Any:
    """What a column holds, or a dotted name inside of one; None if there is nothing."""
    if not isinstance(row, Mapping):
        return None
    if field in row:
        return row[field]
    names = field.split(".")  # any of these dots may be part of a column's name
    inside = (_value(row.get(".".join(names[:i])), ".".join(names[i:])) for i in range(1, len(names)))
    return next((value for value in inside if value is not None), None)


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
    if WITH_ANSWERS.match(value):
        raise ValueError("this is a dialogue with its answers; set prompts.format=dialogue")
    return [("user", value)]


def _dialogue(value: Any) -> list[Turn]:
    """`Human: ...` (or `User:`) and `Assistant: ...` in any case, perhaps behind `System: ...`.

    Labels stand at the beginning of lines. If they do not alternate there, but those behind blank lines do, the others
    are what somebody quoted.
    """
    text = re.sub(r"\r\n?", "\n", value).strip() if isinstance(value, str) else ""
    if not re.match(r"(?:human|user|assistant|system)[ \t]*:", text, re.IGNORECASE):
        labels = "a dialogue begins with Human:, User:, System: or Assistant:"
        if re.match(r"\W*\w+\W*:", text):  # as with ### Human:, H: or Q:
            raise ValueError(f"{labels}, and every turn with such a label on a new line: write the labels so")
        raise ValueError(f"{labels}; set prompts.format=text for plain questions")
    readings = [_divided(text, gap) for gap in (LINE, BLANK_LINE)]
    turns = _up_to_the_question(_joined(next(filter(_alternate, readings), readings[0])))
    questions = [said for role, said in turns if role == "user"]
    is_hidden = any((first := FIRST_LABEL.search(said)) and first[1] for said in questions)
    if not any(role == "assistant" for role, _ in readings[0]):
        is_hidden = is_hidden or HIDDEN_ANSWER.search(text) is not None
    if is_hidden:
        raise ValueError("a question holds an answer: write Assistant: in front of answers, behind a blank line")
    return turns


def _divided(text: str, gap: str) -> list[Turn]:
    """The turns of a dialogue whose labels stand behind gaps. A dialogue has one name for its user."""
    user = re.search(r"^[ \t]*(human|user)[ \t]*:", text, re.IGNORECASE | re.MULTILINE)
    label = rf"({user[1] if user else 'human'}|assistant|\Asystem)[ \t]*:"
    _, *pieces = re.split(rf"(?:\A|{gap}){label}", text, flags=re.IGNORECASE)
    return [(ROLES[name.casefold()], said.strip()) for name, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _alternate(turns: Sequence[Turn]) -> bool:
    return all(one != other for (one, _), (other, _) in pairwise(turns))


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """With one turn where several of a speaker follow each other: templates want turns to alternate."""
    grouped = groupby(turns, key=lambda turn: turn[0])
    return [(role, "\n\n".join(said for _, said in group).strip()) for role, group in grouped]


def _conversation(value: Any) -> list[Turn]:
    """A list of messages with `role` and `content`, or with ShareGPT's `from` and `value`, up to the last question."""
    if not _are_messages(value):
        raise ValueError(f"a conversation is a list of messages; {_remedy(value)}")
    asked = (i for i in reversed(range(len(value))) if _role(value[i]) == "user" and _is_visible(_text(value[i])))
    # Behind the question there may be anything, such as calls of tools.
    return _up_to_the_question([_turn(message) for message in value[: next(asked, len(value)) + 1]])


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _remedy(value: Any) -> str:
    """What to do about a value that is not a list of messages."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        return "this is a text that holds JSON: write the list itself into the column"
    inside = [key for key, held in value.items() if held and _are_messages(held)] if isinstance(value, Mapping) else []
    if inside:
        return f"this is an object that holds one: add .{inside[0]} to prompts.field"
    return "set prompts.format to text or dialogue for texts"


def _turn(message: Mapping[str, Any]) -> Turn:
    role = _role(message)
    if role is None:
        name = _first(message, "role", "from")
        raise ValueError(f"a message has the role {name!r:.40}: use system, user or assistant (role or from)")
    return role, _text(message)


def _role(message: Mapping[str, Any]) -> str | None:
    name = _first(message, "role", "from")
    return ROLES.get(name.casefold()) if isinstance(name, str) else None


def _text(message: Mapping[str, Any]) -> str:
    content = _first(message, "content", "value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise ValueError(f"the {_role(message)} message has no text: give one as content or value")
    return content


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    """What the first of the keys holds that is not null; tables of both kinds of messages have all of them."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


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
