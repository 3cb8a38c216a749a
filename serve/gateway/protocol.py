"""Errors and answers as clients see them. Knows nothing of Ray, models or tokenizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

MAX_ERROR = 1000  # characters of an error message


class ApiError(Exception):
    """An error that the client sees, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(status, message, param, code, retry_after_s)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s
        self.message, self.param = _sendable(message), None if param is None else _sendable(param)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        # The official client waits as long as this says, up to a minute.
        return {"Retry-After": str(min(max(math.ceil(self.retry_after_s), 1), 60))}


def _sendable(text: str) -> str:
    """Text of a client that an error repeats: not every JSON string is valid UTF-8, and it may be long."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."


@dataclass(frozen=True)
class Shape:
    """The format of one endpoint's answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[str], Json]  # text of a finished choice
    piece: Callable[[str], Json]  # text added to a choice
    opening: Json | None  # first chunk of every choice
    ending: Json  # last chunk of every choice


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text}},
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {}},
)
TEXT = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text: {"text": text},
    lambda text: {"text": text},
    None,
    {"text": ""},
)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


DONE = "data: [DONE]\n\n"
