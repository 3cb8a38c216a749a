"""Conversations as token ids: the one place that applies chat templates.

A chat template is a program that came with the model. It may raise anything, and it may leave out what it is given:
a system text, a turn, or every text that is not given as a list of parts. So the conversation is rendered with a mark
behind every text first, which shows what arrives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import jinja2

from mavis_dist.models.directory import ModelError
from mavis_dist.types import one_line, text_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a chat template: begin-of-text if there is one, the system text, then labelled turns, separated
# by blank lines.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% endif %}"
    "{{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# One of these stands inside of what is spelt like a control token until the text is encoded. They are no characters.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
USER = [{"role": "user", "content": "Hello"}]

Turn = dict[str, Any]
Render = Callable[[Sequence[Turn]], str]


class ChatOptions(TypedDict, total=False):
    """How a conversation ends and is encoded, by the names of transformers and vLLM."""

    add_generation_prompt: bool  # end with what begins the assistant's answer; default: true
    continue_final_message: bool  # end within the last message, which the answer continues; excludes the first
    split_special_tokens: bool  # control tokens that are spelt in a message are encoded as text; default: true


class ChatError(ModelError):
    """A conversation that the model's chat template does not take; the message is one sentence for the user."""


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

    Messages have `role` (system, user, assistant) and `content`, a text. Every text is in the prompt, or the
    conversation is refused:

    - Without a system message, `system` becomes one, so that a chat template's default is never used. It alone may be
      lost, if the template leaves system texts out (`takes_system`).
    - If a template rejects system messages, their text is put before the first user message.
    - If a template reads texts only as lists of parts, they are given as such.

    Control tokens that are spelt in a message are encoded as text. Tokenizers without a chat template use
    PLAIN_TEMPLATE. Options as in ChatOptions.

    Raises:
        ChatError: if the template rejects the conversation or leaves out a message, or a text cannot be encoded.
    """
    turns: list[Turn] = [dict(message) for message in messages]
    is_given = any(turn["role"] == "system" for turn in turns)
    if not is_given:
        turns.insert(0, {"role": "system", "content": system})
    for turn in turns:
        _check(turn["content"], f"the {turn['role']} message")
    mark = _unused(turn["content"] for turn in turns)
    render = partial(_render, tokenizer, continue_final_message, add_generation_prompt and not continue_final_message)
    fitting = _fitting(render, turns, mark, may_lose_system=not is_given)
    if split_special_tokens:
        fitting = [_with_text(turn, partial(_cut, tokenizer, turn["role"], mark)) for turn in fitting]
    first, *others = render(fitting).split(mark)
    return _encode(tokenizer, _ids(tokenizer, first), others)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a text without a chat template, after begin-of-text where the tokenizer adds it.

    Whoever writes the whole prompt may spell control tokens; with `split_special_tokens` they stay text. Raises
    ChatError for a text that cannot be encoded.
    """
    _check(text, "the text")
    mark = _unused([text])
    first, *others = (_cut(tokenizer, "user", mark, text) if split_special_tokens else text).split(mark)
    # Some tokenizers add an end of text as well, which no prompt ends with.
    begin = [id_ for id_ in tokenizer.encode("")[:1] if id_ == tokenizer.bos_token_id]
    return _encode(tokenizer, [*begin, *_ids(tokenizer, first)], others)


def place_of_system(tokenizer: PreTrainedTokenizerBase) -> Literal["turn", "question"] | None:
    """Where a system text goes: into a turn of its own, or before the first question; None: nowhere.

    Some templates leave it out without a word. `chat_ids` then refuses conversations with a system message.
    """
    turns = [{"role": "system", "content": "Be kind."}, *USER]
    try:
        fitting = _fitting(partial(_render, tokenizer, False, True), turns, MARKS[0], may_lose_system=False)
    except ChatError:
        return None
    return "turn" if len(fitting) == len(turns) else "question"


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a system text reaches the prompt."""
    return place_of_system(tokenizer) is not None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that a chat template puts right behind an assistant's message, such as `<|im_end|>`, or None."""
    if not tokenizer.chat_template:
        return None
    answer = f"{MARKS[1]}0"
    try:
        before, _, after = _sample(tokenizer, answer, False).rpartition(answer)
    except ChatError:
        return None
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    behind = max((token for token in ids if after.lstrip().startswith(token)), key=len, default=None)
    beginning = max((token for token in ids if token in before), key=before.rfind, default=None)
    # Some templates always end with the beginning of the next answer.
    if behind is None or (behind == beginning and before.endswith(after)):
        return None
    return ids[behind]


def _sample(tokenizer: PreTrainedTokenizerBase, answer: str, generation_prompt: bool) -> str:
    """A short conversation as text, with an answer in it; raises ChatError."""
    turns = [{"role": "system", "content": ""}, *USER, {"role": "assistant", "content": answer}]
    render = partial(_render, tokenizer, False, generation_prompt)
    return render(_fitting(render, turns, MARKS[0], may_lose_system=True))


def _fitting(render: Render, turns: Sequence[Turn], mark: str, may_lose_system: bool) -> Sequence[Turn]:
    """The turns as the template takes them, with nothing left out, except the system text if that is allowed.

    Raises ChatError. Its reason is that against the last arrangement: a rejected system message does not matter if its
    text can be put elsewhere.
    """
    rejection = ChatError("the model's chat template takes no messages: use another model")
    for arranged in filter(None, (turns, _system_in_question(turns))):
        try:
            fitting, lost = _least_lost(render, arranged, mark)
        except ChatError as error:
            rejection = error
            continue
        roles = [fitting[place]["role"] for place in sorted(lost)]
        if not roles or (may_lose_system and roles == ["system"]):
            return fitting
        remedy = "put its text into a user message" if roles[0] == "system" else "change the messages' roles or order"
        raise ChatError(
            f"the model's chat template leaves out the {roles[0]} message: {remedy}, or use a model that takes it"
        )
    raise rejection


def _least_lost(render: Render, turns: Sequence[Turn], mark: str) -> tuple[Sequence[Turn], Collection[int]]:
    """The turns as texts, or where these get lost as lists of parts; and which turns are lost even so.

    Raises ChatError if the template rejects both.
    """
    rejection, lost = None, set(range(len(turns)))
    try:
        lost = _lost(render, turns, mark)
    except ChatError as error:
        rejection = error
    if lost:
        in_parts = [_in_parts(turn) if place in lost else turn for place, turn in enumerate(turns)]
        with suppress(ChatError):
            if len(left := _lost(render, in_parts, mark)) < len(lost):
                return in_parts, left
    if rejection is not None:
        raise rejection
    return turns, lost


def _lost(render: Render, turns: Sequence[Turn], mark: str) -> set[int]:
    """Places of the turns whose texts do not reach the prompt; raises ChatError.

    Marks around a text stay if the template strips spaces, changes letters, or cuts commands out of the text. Answers
    have one behind them alone: templates cut the reasoning before it.
    """
    marks = [f"{mark}{place}{mark}" for place in range(len(turns))]
    rendered = render(
        [_with_text(turn, partial(_around, turn["role"], mark)) for turn, mark in zip(turns, marks, strict=True)]
    )
    expected = [1 if turn["role"] == "assistant" else 2 for turn in turns]
    return {
        place
        for place, (turn, mark, count) in enumerate(zip(turns, marks, expected, strict=True))
        if rendered.count(mark) < count or _is_quoted(turn, mark, rendered)
    }


def _around(role: str, mark: str, text: str) -> str:
    return f"{text}{mark}" if role == "assistant" else f"{mark}{text}{mark}"


def _is_quoted(turn: Turn, mark: str, rendered: str) -> bool:
    """Whether a list of parts was written out as it is."""
    return not isinstance(turn["content"], str) and any(f"{mark}{quote}" in rendered for quote in "'\"")


def _render(
    tokenizer: PreTrainedTokenizerBase, continue_final: bool, generation_prompt: bool, turns: Sequence[Turn]
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(turns),
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
            tokenize=False,
            continue_final_message=continue_final,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:  # whatever the template does
        if continue_final and isinstance(error, ValueError):
            raise ChatError(
                "the model's chat template changes the final message, so it cannot be continued: leave out "
                "continue_final_message"
            ) from None
        reason = error if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise ChatError(
            f"the model's chat template rejects the messages ({one_line(reason)}): change their roles or order"
        ) from None
    return str(text)


def _system_in_question(turns: Sequence[Turn]) -> Sequence[Turn] | None:
    """The system texts put before the first user message; None if there is none."""
    rest = [turn for turn in turns if turn["role"] != "system"]
    first = next((place for place, turn in enumerate(rest) if turn["role"] == "user"), None)
    if first is None:
        return None
    texts = [turn["content"] for turn in turns if turn["role"] == "system"]
    question = {**rest[first], "content": "\n\n".join(filter(None, [*texts, rest[first]["content"]]))}
    return [*rest[:first], question, *rest[first + 1 :]]


def _in_parts(turn: Turn) -> Turn:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _with_text(turn: Turn, change: Callable[[str], str]) -> Turn:
    """A turn with its text changed, in whichever form it is."""
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": change(content)}
    return {**turn, "content": [{**part, "text": change(part["text"])} for part in content]}


def _check(text: str, what: str) -> None:
    if fault := text_fault(text):
        raise ChatError(f"{what} {text!r:.60} holds {fault}: remove it")


def _unused(texts: Iterable[str]) -> str:
    """A mark that none of the texts contains."""
    used = set().union(*texts)
    for mark in MARKS:
        if mark not in used:
            return mark
    raise ChatError("a text holds all 32 code points from U+FDD0 to U+FDEF, which are no characters: remove one")


def _cut(tokenizer: PreTrainedTokenizerBase, role: str, mark: str, text: str) -> str:
    """The text with a mark behind the first character of everything that is spelt like a control token, also where two
    overlap.
    """
    known = _control_tokens(tokenizer, len(tokenizer), tokenizer.chat_template, role != "assistant")
    spelt = "|".join(re.escape(token) for token in known if token in text)
    return re.sub(f"(?={spelt})(.)", rf"\1{mark}", text, flags=re.DOTALL) if spelt else text


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, template: str | None, with_template: bool
) -> tuple[str, ...]:
    """What the tokenizer calls special and, `with_template`, the added tokens that the template writes: many tokenizers
    do not call them special. Not so in answers, from which templates cut their reasoning by such a token.
    """
    written = template or PLAIN_TEMPLATE
    with suppress(ChatError):
        written += _sample(tokenizer, "", True)  # some put them together from parts
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1
        and token.content.strip()
        and (token.special or (with_template and token.content in written))
    )


def _encode(tokenizer: PreTrainedTokenizerBase, ids: list[int], others: Sequence[str]) -> list[int]:
    """The ids of a rendered text, behind those of its first piece. Pieces are encoded one by one: they never join."""
    newline = _ids(tokenizer, "\n") if others else []
    for piece in others:
        # Behind a newline no tokenizer adds the space that some put before the start of a text.
        found = _ids(tokenizer, f"\n{piece}")
        ids += found[len(newline) :] if found[: len(newline)] == newline else _ids(tokenizer, piece)
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
