"""Log-probabilities in responses: aligns tokens with text, in the formats of OpenAI's two endpoints.

Knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mavis_dist.decode import Candidate, TokenLogprobs
from mavis_dist.decode.text import REPLACEMENT, StoppedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # how byte-level vocabularies spell bytes
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how the others do


class Spelling(NamedTuple):
    """A token as text and as bytes; bytes are None where the vocabulary does not define them."""

    text: str
    bytes: list[int] | None


class Speller:
    """Spells the tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Some tokenizers drop the space before the first word, so a token is spelt after another one.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known: dict[int, Spelling] = {}

    def __call__(self, token: int) -> Spelling:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> Spelling:
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        if REPLACEMENT not in text:
            return Spelling(text, list(text.encode()))
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := _BYTE_TOKEN.fullmatch(piece):
            return Spelling(text, [int(match[1], 16)])
        is_spelt = all(letter in _BYTE_OF for letter in piece)
        return Spelling(text, [_BYTE_OF[letter] for letter in piece] if is_spelt else None)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class LogprobEntry(NamedTuple):
    """A token whose text has been emitted."""

    logprobs: TokenLogprobs
    start: int  # of its text, in characters of the answer


class Alignment:
    """Emits the log-probabilities of a token together with its text, never before.

    Text may be held back: a character spread over several tokens, or a possible stop string. Tokens without text, such
    as the end of the answer, are not emitted.
    """

    def __init__(self, text: StoppedText):
        self._text = text
        self._num_sent = 0  # characters emitted
        self._end = 0  # of the text of all tokens so far, in characters
        self._unfinished: list[TokenLogprobs] = []  # tokens that the next one shares a character with
        self._waiting: list[tuple[LogprobEntry, int]] = []  # with the end of their text

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], last: bool
    ) -> tuple[str, list[LogprobEntry]]:
        """The text that is final by now, and the tokens that it comes from."""
        text = "".join(self._add(token, one) for token, one in zip(tokens, logprobs, strict=True))
        if last:
            rest = self._text.add((), last=True)
            self._num_sent += len(rest)
            self._place(self._num_sent)
            text += rest
        return text, self._ready(last)

    def _add(self, token: int, logprobs: TokenLogprobs) -> str:
        text = self._text.add((token,))
        self._num_sent += len(text)
        self._unfinished.append(logprobs)
        self._place(self._num_sent + self._text.num_held)
        return text

    def _place(self, end: int) -> None:
        """Note the place of the unfinished tokens' text, once it is complete."""
        if end > self._end:
            self._waiting += [(LogprobEntry(logprobs, self._end), end) for logprobs in self._unfinished]
            self._unfinished, self._end = [], end

    def _ready(self, last: bool) -> list[LogprobEntry]:
        """Tokens whose text is emitted; at the end also those that a stop string cut short."""
        is_out = [entry.start < self._num_sent and (last or end <= self._num_sent) for entry, end in self._waiting]
        ready = [entry for (entry, _), out in zip(self._waiting, is_out, strict=True) if out]
        self._waiting = [waiting for waiting, out in zip(self._waiting, is_out, strict=True) if not out]
        return ready


def chat_logprobs(entries: Sequence[LogprobEntry], spell: Speller) -> Json:
    """`choices[].logprobs` of /v1/chat/completions."""

    def named_token(one: Candidate) -> Json:
        spelling = spell(one.token)
        return {"token": spelling.text, "logprob": one.logprob, "bytes": spelling.bytes}

    content = [
        {
            **named_token(logprobs.chosen),
            "top_logprobs": [{**named_token(one), "mavis": {"logratio": one.logratio}} for one in logprobs.top],
            "mavis": _steering(logprobs),
        }
        for logprobs, _ in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(entries: Sequence[LogprobEntry], spell: Speller) -> Json:
    """`choices[].logprobs` of /v1/completions."""

    def name_of(token: int) -> str:
        text, parts = spell(token)
        if REPLACEMENT not in text or parts is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in parts)  # parts of characters stay apart

    return {
        "tokens": [name_of(logprobs.chosen.token) for logprobs, _ in entries],
        "token_logprobs": [logprobs.chosen.logprob for logprobs, _ in entries],
        "top_logprobs": [{name_of(one.token): one.logprob for one in logprobs.top} for logprobs, _ in entries],
        "text_offset": [start for _, start in entries],
        "mavis": [_steering(logprobs) for logprobs, _ in entries],
    }


def _steering(logprobs: TokenLogprobs) -> Json:
    divergence = logprobs.divergence if math.isfinite(logprobs.divergence) else None
    return {"logratio": logprobs.chosen.logratio, "divergence": divergence}
