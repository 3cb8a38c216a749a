"""Incremental decoding of tokens to text. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
MAX_CONTEXT = 32  # tokens before an answer; their text matters only as that of no beginning


class Detokenizer:
    """Tokens in, text out; characters that span several tokens are returned whole."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        """
        Args:
            before: tokens that the text goes on from: some tokenizers drop the space at the beginning of a text.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = list(before[-MAX_CONTEXT:])
        if self._decode(self._ids).endswith(REPLACEMENT):  # what completes a character is no text of its own
            self._ids = []
        self._context = 0  # where decoding starts
        self._emitted = len(self._ids)  # tokens whose text has been returned

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text that can no longer change; with `last` also bytes that form no whole character."""
        self._ids.extend(ids)
        before = self._decode(self._ids[self._context : self._emitted])
        text = self._decode(self._ids[self._context :])
        if (text.endswith(REPLACEMENT) and not last) or len(text) <= len(before):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StoppedText:
    """The text of an answer up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided. `before` as in Detokenizer; stop
    strings are not looked for there.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self._detokenizer, self._stop = Detokenizer(tokenizer, before), tuple(stop)
        self._held = ""
        self.is_stopped = False

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text that can no longer change; with `last` also the text that was held back."""
        text = self._held + self._detokenizer.add(ids, last)
        if self.is_stopped:
            return ""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:  # the one that is completed first, however the text is split into pieces
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
