"""Conversations as token ids: the one place that applies chat templates.

A chat template is a program that came with the model. It may raise anything, and it may leave out what it is given:
a system text, a turn, or every text that is not given as a list of parts. So the conversation is rendered with a mark
behind every text first, which shows what arrives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

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
# A private-use character, put inside of what is spelt like a control token until the text is encoded.
BREAK = "\U000f0000"
USER = [{"role": "user", "content": "Hello"}]

Turn = dict[str, Any]
Render = Callable[[Sequence[Turn]], str]


class ChatError(ModelError):
    """A conversation that the model's chat template does not take; the message is one sentence for the user."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    system: str,
    *,
    continue_final: bool = False,
    generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's answer.

    Messages have `role` (system, user, assistant) and `content`, a text. Every text is in the prompt, or the
    conversation is refused:

    - Without a system message, `system` becomes one, so that a chat template's default is never used. It alone may be
      lost, if the template leaves system texts out (`takes_system`).
    - If a template rejects system messages, their text is put before the first user message.
    - If a template reads texts only as lists of parts, they are given as such.
    - Control tokens that are spelt in a message are encoded as ordinary text.

    Tokenizers without a chat template use PLAIN_TEMPLATE.

    Args:
        continue_final: end within the last message, which the answer continues (vLLM: continue_final_message).
        generation_prompt: add what begins the assistant's answer (vLLM: add_generation_prompt); not with
            `continue_final`.

    Raises:
        ChatError: if the template rejects the conversation or leaves out a message, or a text cannot be encoded.
    """
    turns: list[Turn] = [dict(message) for message in messages]
    for turn in turns:
        if fault := text_fault(turn["content"]):
            raise ChatError(f"the {turn['role']} message {turn['content']!r:.60} holds {fault}: remove it")
    is_given = any(turn["role"] == "system" for turn in turns)
    if not is_given:
        turns.insert(0, {"role": "system", "content": system})
    render = partial(_render, tokenizer, continue_final, generation_prompt and not continue_final)
    fitting = _fitting(render, turns, may_lose_system=not is_given)
    protect = _protection(tokenizer)
    return _encode(tokenizer, render([_with_text(turn, protect) for turn in fitting]))


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a system text reaches the prompt, in a turn of its own or before the first question.

    Some templates leave it out without a word. `chat_ids` then refuses conversations with a system message.
    """
    try:
        chat_ids(tokenizer, [{"role": "system", "content": "Be kind."}, *USER], "")
    except ChatError:
        return False
    return True


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that a chat template puts right behind an assistant's message, such as `<|im_end|>`, or None."""
    answer = "Qx0xQ"
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "system", "content": ""}, *USER, {"role": "assistant", "content": answer}]
    render = partial(_render, tokenizer, False, False)
    try:
        before, _, after = render(_fitting(render, turns, may_lose_system=True)).rpartition(answer)
    except ChatError:
        return None
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    behind = max((token for token in ids if after.lstrip().startswith(token)), key=len, default=None)
    beginning = max((token for token in ids if token in before), key=before.rfind, default=None)
    # Some templates always end with the beginning of the next answer.
    if behind is None or (behind == beginning and before.endswith(after)):
        return None
    return ids[behind]


def _fitting(render: Render, turns: Sequence[Turn], may_lose_system: bool) -> Sequence[Turn]:
    """The turns as the template takes them, with nothing left out, except the system text if that is allowed.

    Raises ChatError. Its reason is that against the last arrangement: a rejected system message does not matter if its
    text can be put elsewhere.
    """
    rejection = ChatError("the model's chat template takes no messages: use another model")
    for arranged in filter(None, (turns, _system_in_question(turns))):
        try:
            fitting, lost = _least_lost(render, arranged)
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


def _least_lost(render: Render, turns: Sequence[Turn]) -> tuple[Sequence[Turn], Collection[int]]:
    """The turns as texts, or where these get lost as lists of parts; and which turns are lost even so.

    Raises ChatError if the template rejects both.
    """
    rejection, lost = None, set(range(len(turns)))
    try:
        lost = _lost(render, turns)
    except ChatError as error:
        rejection = error
    if lost:
        in_parts = [_in_parts(turn) if place in lost else turn for place, turn in enumerate(turns)]
        with suppress(ChatError):
            if len(left := _lost(render, in_parts)) < len(lost):
                return in_parts, left
    if rejection is not None:
        raise rejection
    return turns, lost


def _lost(render: Render, turns: Sequence[Turn]) -> set[int]:
    """Places of the turns whose texts do not reach the prompt; raises ChatError.

    A mark behind a text stays if the template strips spaces, or commands and reasoning inside of the text.
    """
    marks = [f"Qx{place}xQ" for place in range(len(turns))]
    rendered = render([_with_text(turn, partial(_behind, mark)) for turn, mark in zip(turns, marks, strict=True)])
    return {place for place, mark in enumerate(marks) if mark not in rendered}


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
        raise ChatError(
            f"the model's chat template rejects the messages ({one_line(error)}): change their roles or order"
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


def _behind(mark: str, text: str) -> str:
    return text + mark


def _protection(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that breaks what is spelt like a control token: a special token, or one that the template writes."""
    template = str(tokenizer.chat_template or PLAIN_TEMPLATE)
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1 and token.content.strip() and (token.special or token.content in template)
    ]
    if not tokens:
        return lambda text: text
    starts = re.compile(f"(?={'|'.join(map(re.escape, tokens))})(.)", re.DOTALL)
    return lambda text: starts.sub(rf"\1{BREAK}", text.replace(BREAK, ""))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a rendered conversation. Its pieces between breaks are encoded one by one, so that they never join."""
    first, *others = text.split(BREAK)
    ids = _ids(tokenizer, first)
    newline = _ids(tokenizer, "\n") if others else []
    for piece in others:
        # Behind a newline no tokenizer adds the space that some put before the start of a text.
        found = _ids(tokenizer, f"\n{piece}")
        ids += found[len(newline) :] if found[: len(newline)] == newline else _ids(tokenizer, piece)
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
