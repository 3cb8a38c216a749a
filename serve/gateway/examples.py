"""Examples for /openapi.json: request bodies, and the responses to them."""

from __future__ import annotations

from typing import Any

from serve.gateway.protocol import DONE, ApiError, Shape, event
from serve.gateway.responses import ErrorBody, ResponseBody

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "I start a new job on Monday. Any advice?"}]
ANSWER = "Be curious, and ask questions."
PREFERENCES = [
    {"text": "Answer in as few words as possible.", "weight": 0.6},
    {"text": "Be warm, positive and encouraging.", "weight": 0.4},
]

CHAT_BODIES: dict[str, Any] = {
    "base": {"summary": "The base model", "value": {"model": MODEL, "messages": QUESTION}},
    "objectives": {
        "summary": "Trained objectives, by weight",
        "value": {
            "model": MODEL,
            "messages": QUESTION,
            "objective_weights": {"positive": 0.7, "brief": 0.3},
            "beta": 6,
            "seed": 1,
        },
    },
    "words": {
        "summary": "Preferences: objectives given as sentences",
        "value": {"model": MODEL, "messages": QUESTION, "preferences": PREFERENCES, "seed": 1},
    },
    "logprobs": {
        "summary": "Log-ratio of every token to the base model, streamed",
        "value": {
            "model": MODEL,
            "messages": QUESTION,
            "objective_weights": {"positive": 1},
            "logprobs": True,
            "top_logprobs": 5,
            "stream": True,
        },
    },
}
TEXT_BODIES: dict[str, Any] = {
    "objectives": {
        "summary": "Trained objectives, in a flat field",
        "value": {
            "model": MODEL,
            "prompt": "My first day at work was",
            "max_tokens": 40,
            "vllm_xargs": {"objective_weights": "positive=0.7,brief=0.3"},
        },
    }
}

_STEERING = {
    "objective_weights": {"positive": 0.7, "brief": 0.3},
    "beta": 6.0,
    "tilt_cap": 3.0,
    "residual_cap": 1.0,
    "guide_every": 1,
}
_REPORT = {"divergence": 9.4, "values": {"positive": 1.2, "brief": 0.4}, "candidates_per_token": 5.1}
_HEAD = {"created": 1795323600, "model": MODEL}


def answer(shape: Shape, whole: type[ResponseBody], chunk: type[ResponseBody], text: str) -> dict[str, Any]:
    """The documented answers of one endpoint, whole and streamed."""
    head, steering = {"id": f"{shape.id_prefix}-1f0c", **_HEAD}, {**_STEERING, "seed": 1}
    ended = {"finish_reason": "stop", "logprobs": None, "mavis": _REPORT}
    usage = {"prompt_tokens": 31, "completion_tokens": 12, "total_tokens": 43}
    chunk_head = {**head, "object": shape.chunk_object}
    chunks = [
        {**chunk_head, "choices": [{"finish_reason": None, "logprobs": None, "index": 0, **shape.piece(text)}]},
        {**chunk_head, "choices": [{**ended, "index": 0, **shape.ending}], "mavis": steering},
    ]
    content = {
        "application/json": {
            "example": {
                **head,
                "object": shape.whole_object,
                "choices": [{"index": 0, **shape.whole(text), **ended}],
                "usage": usage,
                "mavis": steering,
            }
        },
        "text/event-stream": {"itemSchema": _event_of(chunk), "example": "".join(map(event, chunks)) + DONE},
    }
    return {"description": "The answer; with `stream` as events", "model": whole, "content": content}


def _event_of(chunk: type[ResponseBody]) -> dict[str, Any]:
    bodies = [{"$ref": f"#/components/schemas/{body.__name__}"} for body in (chunk, ErrorBody)]
    body = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": bodies}}
    data = {"description": "a JSON body; the last event is [DONE] or an error", "anyOf": [body, {"const": "[DONE]"}]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def refusal(description: str, status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    """A documented error."""
    body = ApiError(status, message, param, code).body
    return {"description": description, "model": ErrorBody, "content": {"application/json": {"example": body}}}


REFUSALS: dict[int | str, Any] = {
    "4XX": refusal(
        "The request is refused: 400 a field, 401 the key, 404 the model, 413 the body's size, 429 too busy",
        400,
        "objective_weights: there is no objective 'fame'; available: brief, positive",
        "objective_weights",
    ),
    "5XX": refusal("The service failed", 503, "the answer was not complete within 600 s", code="engine_unavailable"),
}
