"""Which tokens end an answer, from everything in a model's directory that says so.

The one place for it: decoding, rollouts and the service use the same ids. Each source alone is often wrong. A chat
model may keep the `</s>` of its base in generation_config.json, while its template ends a turn with `<|im_end|>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis_dist.models.chat import end_of_turn
from mavis_dist.models.directory import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_sources(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, frozenset[int]]:
    """What names the end of an answer -> its token ids; sources that name none are left out.

    What only config.json names does not count if it is an ordinary token and another source names an added one:
    transformers writes the default of the model's class there, which is any token in another vocabulary.
    """
    stated = _stated_sources(directory, tokenizer)
    defaults = _defaults(directory, tokenizer, stated)
    return {source: ids - defaults for source, ids in stated.items() if ids - defaults}


def end_ids(directory: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
    """All ids below `vocabulary` that end an answer, ascending within a source, in the order of `end_sources`.

    Raises:
        ModelError: if there is none.
    """
    sources = end_sources(directory, tokenizer)
    ids = tuple(dict.fromkeys(id_ for named in sources.values() for id_ in sorted(named) if id_ < vocabulary))
    if not ids:
        stated = ", ".join(f"{sorted(named)} in {source}" for source, named in sources.items()) or "none at all"
        raise ModelError(
            f"model {str(directory)!r} has no eos_token_id within its vocabulary of {vocabulary} ({stated}): "
            f"add the key to its generation_config.json"
        )
    return ids


def describe_disagreement(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One line on all tokens that end an answer and who names them; None if all sources name the same."""
    stated = _stated_sources(directory, tokenizer)
    if len(set(stated.values())) < 2:
        return None
    defaults = _defaults(directory, tokenizer, stated)

    def named(ids: Iterable[int]) -> str:
        by_id = {id_: ", ".join(name for name, of_source in stated.items() if id_ in of_source) for id_ in sorted(ids)}
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(id_)!r} ({id_}: {names})" for id_, names in by_id.items())

    line = f"any of these tokens ends an answer: {named(_all(stated) - defaults)}"
    return f"{line}; not the ordinary {named(defaults)}, as defaults of model classes are" if defaults else line


def mark_as_special(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep added tokens that end an answer, such as an `<|im_end|>` that is not marked as special, out of its text."""
    from tokenizers import AddedToken

    added = tokenizer.added_tokens_decoder
    ids = _all(end_sources(directory, tokenizer))
    plain = [added[id_] for id_ in sorted(ids) if id_ in added and not added[id_].special]
    # Line breaks end the answers of some models, and are text everywhere else.
    tokens = [
        AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=True,
        )
        for token in plain
        if token.content.strip()
    ]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)


def _stated_sources(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, frozenset[int]]:
    found = {
        "generation_config.json": _stated(directory / "generation_config.json"),  # from a GGUF file: eos, eot and eom
        "config.json": _stated(directory / "config.json"),
        "tokenizer": _as_ids(tokenizer.eos_token_id),
        "chat template": _as_ids(end_of_turn(tokenizer)),
    }
    return {source: frozenset(ids) for source, ids in found.items() if ids}


def _defaults(
    directory: Path, tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, frozenset[int]]
) -> frozenset[int]:
    """Ordinary tokens that config.json or a copy of it names alone, if another source names an added one."""
    copies = {"config.json"}  # generation_config.json is one where transformers made it without being asked to
    if _read(directory / "generation_config.json").get("_from_model_config"):
        copies.add("generation_config.json")
    others = _all({source: ids for source, ids in stated.items() if source not in copies})
    added = tokenizer.added_tokens_decoder
    if others.isdisjoint(added):
        return frozenset()
    # What a copy has more than the original, somebody has added.
    suspects = stated.get("config.json") or _all({source: ids for source, ids in stated.items() if source in copies})
    vocabulary = range(len(tokenizer))
    return frozenset(id_ for id_ in suspects - others if id_ in vocabulary and id_ not in added)


def _all(sources: Mapping[str, frozenset[int]]) -> frozenset[int]:
    return frozenset[int]().union(*sources.values())


def _stated(file: Path) -> list[int]:
    """The key eos_token_id of a JSON file, also of the text model in it."""
    config = _read(file)
    text = config.get("text_config")
    return _as_ids(config.get("eos_token_id")) + _as_ids(text.get("eos_token_id") if isinstance(text, dict) else None)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _as_ids(value: Any) -> list[int]:
    """The token ids among one value or many; configs hold null, -1 and worse."""
    values: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return [id_ for id_ in values if isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0]
