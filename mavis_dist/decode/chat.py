"""Prompts with preferences in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mavis_dist.decode.preferences import Preference
from mavis_dist.models.chat import ChatOptions, chat_ids
from mavis_dist.types import NEUTRAL_SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack


def chat_prompts(
    tokenizer: PreTrainedTokenizerBase,
    conversation: str | Sequence[Mapping[str, str]],
    preferences: Iterable[tuple[str, float]],
    system: str = NEUTRAL_SYSTEM,
    **options: Unpack[ChatOptions],
) -> tuple[tuple[int, ...], tuple[Preference, ...]]:
    """`Request.prompt` and `Request.preferences` for a question, or a conversation as in `chat_ids`, and preferences
    with their weights.

    A preference is a line of its own after the system text: nothing else distinguishes its prompt from the plain one.
    Preferences of weight 0 get no prompt. `options` are those of `chat_ids`.

    Raises:
        ChatError: as `chat_ids` does.
    """
    turns = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    place = next((place for place, turn in enumerate(turns) if turn["role"] == "system"), None)

    def prompt(line: str) -> tuple[int, ...]:
        if place is None:
            return tuple(chat_ids(tokenizer, turns, system + line, **options))
        turn = {**turns[place], "content": turns[place]["content"] + line}
        return tuple(chat_ids(tokenizer, [*turns[:place], turn, *turns[place + 1 :]], system, **options))

    return prompt(""), tuple(
        Preference(text, prompt(f"\n{text}") if weight else (), weight) for text, weight in preferences
    )


def longest_answer(prompt: Sequence[int], preferences: Sequence[Preference], max_context: int, max_tokens: int) -> int:
    """Tokens of an answer whose request sets no limit: `max_tokens`, or what its longest prompt leaves room for."""
    longest_prompt = max(len(prompt), *(len(preference.prompt) for preference in preferences), 1)
    return max(1, min(max_tokens, max_context - longest_prompt))
