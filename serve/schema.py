"""The HTTP bodies: requests as pydantic models that refuse what they do not know, and builders for answers and errors.

Knows nothing of Ray, models or tokenizers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mavis_dist.types import MAX_COUNT

Json = dict[str, Any]


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
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

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
        # The official client waits for as long as it is told, up to a minute.
        return {"Retry-After": str(min(max(math.ceil(self.retry_after_s), 1), 60))}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class FlatArgs(Body):
    """Steering for clients that cannot send nested extras."""

    objective_weights: str


class Preference(Body):
    """An objective in words."""

    text: Annotated[str, Field(min_length=1, max_length=4000)]
    weight: float = 1.0


class PreferenceParams(Body):
    """How sentences steer. None means: as the preset has it."""

    preset: Literal["mato", "anchor", "linear_alignment", "opad", "context_steering", "amulet"] = "mato"
    adapt: bool | None = None
    tau: float | None = None
    accumulation: Literal["mean", "sum", "decay"] | None = None
    decay: float | None = None
    clip: float | None = None
    c: float | None = None
    alpha: float | None = None
    lam: float | None = None
    nu: float | None = None
    steps: int | None = None
    top_p: float | None = None
    normalise: bool | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
# One or several. As a list in either case, so that a refusal names the text at fault.
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_as_list)]


class GenerationRequest(Body):
    """What both endpoints take. None means: the server's default."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    objective_weights: dict[str, float] | None = None
    beta: Annotated[float, Field(ge=0)] | None = None
    tilt_cap: Annotated[float, Field(gt=0)] | None = None
    preferences: Annotated[list[Preference], Field(max_length=64)] | None = None
    preference_params: PreferenceParams | None = None
    scorer: Literal["full", "lazy", "qhead"] | None = None
    guide_every: Count | None = None
    vllm_xargs: FlatArgs | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    def weights(self) -> dict[str, float]:
        """The objective weights, from whichever field holds them; raises ApiError."""
        if self.vllm_xargs is None:
            return dict(self.objective_weights or {})
        if self.objective_weights is not None:
            raise ApiError(400, "give objective_weights or vllm_xargs.objective_weights, not both", "vllm_xargs")
        return parse_weights(self.vllm_xargs.objective_weights)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self


class TextRequest(GenerationRequest):
    prompt: Annotated[str, Field(min_length=1)]


def parse_weights(text: str) -> dict[str, float]:
    """`positive=0.7,brief=0.3` -> weights; raises ApiError."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight):
            raise ApiError(
                400,
                f"{part!r} is not name=weight with a finite weight and a name of its own; write positive=0.7,brief=0.3",
                "vllm_xargs.objective_weights",
            )
        weights[name] = weight
    return weights


def refusal(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, an unknown field before all others, as a 400 that names the field."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    path = [part for part in first["loc"] if part != "body"]
    # Alternatives of a union end the path with the name of the type that was tried.
    param = ".".join(str(part) for part in path if part not in ("str", "list[TextPart]")) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"the field {param!r} is not supported; remove it", param, "unsupported_field")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param)


@dataclass(frozen=True)
class Shape:
    """How one endpoint words its answers."""

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
