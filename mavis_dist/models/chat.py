"""Conversations as token ids: the one place where a chat template is applied and text of users is encoded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

import jinja2

from mavis_dist.models.directory import ModelError
from mavis_dist.types import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# For tokenizers without a chat template: begin-of-text if there is one, the system text, then labelled turns, separated
# by blank lines.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% endif %}"
    "{{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Cut a text where no control token can be recognised; Unicode will never give them a meaning.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
PROBE = "probe{}ends"  # stands for a message's text; a template has no reason to change or repeat it

Turn = dict[str, Any]


class ChatOptions(TypedDict, total=False):
    """How a conversation ends and is encoded; the first two have the names and the meaning of transformers and vLLM."""

    add_generation_prompt: bool  # end with the start of the assistant's answer; default: true
    continue_final_message: bool  # end in the middle of the last message, so that the answer continues it; excludes it
    split_special_tokens: bool  # control tokens that a message spells stay text; default: true


class TemplateRejection(ModelError):
    """A conversation that a chat template refuses, with the template's own reason."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    system: str,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    split_special_tokens: bool = True,
) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's answer.

    Messages have `role` and `content`. Without a system message, `system` becomes one, so that a chat template's
    default is never used. If a template rejects system messages, their text is put before the first user message; if it
    wants content as a list of parts, it gets that. Tokenizers without a chat template use PLAIN_TEMPLATE. Options as in
    ChatOptions.

    Raises:
        ModelError: if the template rejects the conversation or leaves out the text of a message, or a text is not
            valid Unicode. Where it leaves out `system` alone, a warning is logged once.
    """
    turns: list[Turn] = [dict(message) for message in messages]
    has_default = all(turn["role"] != "system" for turn in turns)
    if has_default:
        turns.insert(0, {"role": "system", "content": system})
    mark = _unused(turn["content"] for turn in turns)
    if split_special_tokens:
        turns = [{**turn, "content": _cut(tokenizer, turn["content"], turn["role"], mark)} for turn in turns]
    ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    text = _conversation(tokenizer, turns, has_default, ending)
    return [token for piece in text.split(mark) for token in _encode(tokenizer, piece, add_special_tokens=False)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a text without a chat template, after begin-of-text where the tokenizer adds it.

    Whoever writes the whole prompt may spell control tokens; with `split_special_tokens` they stay text. Raises
    ModelError for a text that is not valid Unicode.
    """
    mark = _unused([text])
    first, *others = (_cut(tokenizer, text, "user", mark) if split_special_tokens else text).split(mark)
    ids = _encode(tokenizer, first, add_special_tokens=True)
    return ids + [token for piece in others for token in _encode(tokenizer, piece, add_special_tokens=False)]


# --- control tokens ---------------------------------------------------------------------------------------------------


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("a text holds half of a character (a lone surrogate): give whole characters") from None
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _unused(texts: Iterable[str]) -> str:
    """A mark that none of the texts contains."""
    used = "".join(texts)
    for mark in MARKS:
        if mark not in used:
            return mark
    raise ModelError("a text holds all 32 code points from U+FDD0 to U+FDEF, which are no characters: remove one")


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, role: str, mark: str) -> str:
    """The text with a mark inside every control token that it spells.

    Encoded in pieces, it holds none of them; a text that spells none is encoded as ever.
    """
    spelt = _control_tokens(tokenizer, len(tokenizer), str(tokenizer.chat_template or ""), role != "assistant")
    return re.sub(spelt, lambda match: match[0] + mark, text) if spelt else text


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, template: str, with_template: bool
) -> re.Pattern[str] | None:
    """Matches the first character of every control token, also of overlapping ones; None if there are none.

    Control tokens are those that the tokenizer calls special and, `with_template`, the added ones that the template
    writes: many tokenizers do not call them special. Not so in answers, from which templates cut their reasoning by
    such a token.
    """
    rests: dict[str, list[str]] = {}
    for token in tokenizer.added_tokens_decoder.values():
        name = str(token)
        if len(name) > 1 and (token.special or (with_template and name in template)):
            rests.setdefault(name[0], []).append(re.escape(name[1:]))
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(names)})" for first, names in rests.items())
    return re.compile(pattern) if pattern else None


# --- templates --------------------------------------------------------------------------------------------------------


def _conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], has_default: bool, ending: Mapping[str, bool]
) -> str:
    """The whole conversation as text; `has_default`: the first turn is not the caller's."""
    try:
        return _complete(tokenizer, turns, has_default, ending)
    except TemplateRejection:
        merged = _without_system(turns, has_default)
        if merged is None:
            raise
    return _complete(tokenizer, merged, False, ending)


def _complete(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], has_default: bool, ending: Mapping[str, bool]
) -> str:
    """The conversation as text, with the texts of all messages in it."""
    problem: ModelError | None = None
    for form in (dict, _in_parts):  # as strings, else in the form of some multimodal models
        lost = [place for place in _lost(tokenizer, turns, form) if turns[place]["content"].strip()]
        loses_default = has_default and lost == [0]
        if lost and not loses_default:
            place = lost[-1]  # not the default system text
            message = f"message {place - has_default} ({turns[place]['role']})"
            problem = problem or ModelError(
                f"the model's chat template leaves out the text of {message}: put it into a user message"
            )
            continue
        try:
            text = _render(tokenizer, [form(turn) for turn in turns], **ending)
        except TemplateRejection as rejection:
            problem = problem or rejection
            continue
        if loses_default:
            _say_that_system_is_lost(str(tokenizer.chat_template))
        return text
    assert problem is not None
    raise problem


def _in_parts(turn: Turn) -> Turn:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **ending: Any) -> str:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **ending)
    except jinja2.TemplateError as error:
        raise _rejection(error) from None
    # A template is a program of the model's author, and may fail in any way.
    except Exception as error:
        if ending.get("continue_final_message") and isinstance(error, ValueError):
            raise ModelError(
                "the model's chat template changes the final message, so it cannot be continued: leave out "
                "continue_final_message"
            ) from None
        raise _rejection(f"{type(error).__name__}: {error}") from None
    assert isinstance(text, str)
    return text


def _rejection(reason: object) -> TemplateRejection:
    return TemplateRejection(
        f"the model's chat template rejects the messages ({one_line(reason)}): change their roles or order"
    )


def _lost(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], form: Any) -> list[int]:
    """The places of the turns whose text is missing in the conversation.

    Other texts take the place of the real ones: a template may cut these, or write the same words itself.
    """
    words = [PROBE.format(place) for place in range(len(turns))]
    try:
        text = _render(tokenizer, [form({**turn, "content": word}) for turn, word in zip(turns, words, strict=True)])
    except TemplateRejection:  # of these texts, not of the real ones
        return []
    # Parts that are written out as a list are no text.
    is_quoted = form is _in_parts and (f"'{words[0]}'" in text or f'"{words[0]}"' in text)
    return [place for place, word in enumerate(words) if is_quoted or word not in text]


def _without_system(turns: list[Turn], has_default: bool) -> list[Turn] | None:
    """The turns with the system texts before the first user's text; None if there is no place for them."""
    system = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"].strip()]
    rest = [turn for turn in turns if turn["role"] != "system"]
    place = next((place for place, turn in enumerate(rest) if turn["role"] == "user"), None)
    if place is None:
        return None if not rest or (system and not has_default) else rest
    rest[place] = {**rest[place], "content": "\n\n".join([*system, rest[place]["content"]])}
    return rest


@lru_cache(maxsize=8)
def _say_that_system_is_lost(template: str) -> None:
    """Once per template."""
    logger.warning("the model's chat template leaves out system texts: base.system is not given to the model")
