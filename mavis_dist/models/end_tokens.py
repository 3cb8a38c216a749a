"""Which tokens end an answer, from everything in a model's directory that says so.

The one place for it: decoding, rollouts and the service use the same ids. Each source alone is often wrong. A chat
model may keep the `</s>` of its base in generation_config.json, while its template ends a turn with `<|im_end|>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis_dist.models.chat import end_of_turn
from mavis_dist.models.directory import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_sources(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, frozenset[int]]:
    """What names the end of an answer -> its token ids; sources that name none are left out.

    Only what the files state counts, not the defaults of a model's class, which are ordinary tokens in other
    vocabularies.
    """
    found = {
        "generation_config.json": _stated(directory / "generation_config.json"),  # from a GGUF file: eos, eot and eom
        "config.json": _stated(directory / "config.json"),
        "tokenizer": _as_ids(tokenizer.eos_token_id),
        "chat template": _as_ids(end_of_turn(tokenizer)),
    }
    return {source: frozenset(ids) for source, ids in found.items() if ids}


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
    sources = end_sources(directory, tokenizer)
    if len(set(sources.values())) < 2:
        return None
    by_id = {id_: [name for name, ids in sources.items() if id_ in ids] for id_ in frozenset().union(*sources.values())}
    named = [
        f"{tokenizer.convert_ids_to_tokens(id_)!r} ({id_}: {', '.join(names)})" for id_, names in sorted(by_id.items())
    ]
    return f"any of these tokens ends an answer: {', '.join(named)}"


def mark_as_special(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep added tokens that end an answer, such as an `<|im_end|>` that is not marked as special, out of its text."""
    from tokenizers import AddedToken

    added = tokenizer.added_tokens_decoder
    ids = frozenset[int]().union(*end_sources(directory, tokenizer).values())
    plain = [added[id_].content for id_ in sorted(ids) if id_ in added and not added[id_].special]
    # Line breaks end the answers of some models, and are text everywhere else.
    tokens = [AddedToken(content, normalized=False, special=True) for content in plain if content.strip()]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)


def _stated(file: Path) -> list[int]:
    """The key eos_token_id of a JSON file, also of the text model in it."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = config.get("text_config")
    return _as_ids(config.get("eos_token_id")) + _as_ids(text.get("eos_token_id") if isinstance(text, dict) else None)


def _as_ids(value: Any) -> list[int]:
    """The token ids among one value or many; configs hold null, -1 and worse."""
    values: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return [id_ for id_ in values if isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0]
