"""The HTTP response bodies as pydantic models, for /openapi.json and for tests.

The service builds its bodies as plain dicts: validating every chunk of a stream would cost time and change nothing.
Knows nothing of Ray.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

FinishReason = Literal["stop", "length"]


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- what steering did ------------------------------------------------------------------------------------------------


class PreferenceReport(ResponseBody):
    text: str
    final_weight: float = Field(description="weight at the last token; it adapts during the answer")
    mean_weight: float | None = Field(description="mean over the answer")
    mean_reward: float | None = Field(description="mean reward of a token, in nats")


class ChoiceReport(ResponseBody):
    """What steering did to an answer. Unknown values are null."""

    divergence: float | None = Field(description="KL divergence from the base model over the answer, in nats")
    values: dict[str, float | None] = Field(
        description="objective -> value at the last token it was computed for, in standard deviations of its reward"
    )
    candidates_per_token: float = Field(description="mean number of candidates scored by value models")
    worded_divergence: float | None = Field(None, description="the preferences' part of `divergence`, in nats")
    preferences: list[PreferenceReport] = Field([], description="absent without preferences")


class AppliedPreference(ResponseBody):
    text: str
    weight: float = Field(description="normalised to a sum of 1, if preference_params.normalise")


class AppliedPreferenceParams(ResponseBody):
    """As preference_params of the request, with the preset filled in."""

    adapt: bool
    tau: float
    accumulation: str
    decay: float
    clip: float
    c: float
    alpha: float
    lam: float
    nu: float
    steps: int
    top_p: float
    normalise: bool


class AppliedSteering(ResponseBody):
    """The steering that was applied, with defaults filled in."""

    objective_weights: dict[str, float] = Field(description="normalised to a sum of 1")
    beta: float
    tilt_cap: float | None = Field(description="nats; null: unbounded")
    residual_cap: float | None = Field(description="nats, for the scorer predicted; null: unbounded")
    guide_every: int
    seed: int
    preferences: list[AppliedPreference] = Field([], description="absent without preferences, as the next two")
    preference_params: AppliedPreferenceParams | None = None
    prompt_template: Literal["none", "model", "plain"] | None = Field(
        None,
        description="where preferences are put: a system turn of the model's or of a plain template; none: before the "
        "prompt",
    )


# --- log-probabilities ------------------------------------------------------------------------------------------------


class LogRatio(ResponseBody):
    logratio: float = Field(description="log pi - log pi_ref of the token, in nats")


class TokenSteering(LogRatio):
    divergence: float | None = Field(description="KL divergence of the step, in nats; null if unknown")


class TopLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8 bytes; null if the vocabulary does not define them")
    mavis: LogRatio


class ChatTokenLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]
    mavis: TokenSteering


class ChatLogprobs(ResponseBody):
    content: list[ChatTokenLogprob]
    refusal: None


class TextLogprobs(ResponseBody):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="start of each token's text, in characters of the answer")
    mavis: list[TokenSteering]


# --- completions ------------------------------------------------------------------------------------------------------


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(ResponseBody):
    role: Literal["assistant"]
    content: str


class ChatChoice(ResponseBody):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    mavis: ChoiceReport


class TextChoice(ResponseBody):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None
    mavis: ChoiceReport


class _Head(ResponseBody):
    id: str
    created: int = Field(description="Unix time, in seconds")
    model: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    mavis: AppliedSteering


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    mavis: AppliedSteering


class Delta(ResponseBody):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = Field("assistant", description="in the first chunk only")
    content: str = Field("", description="absent in the last chunk")


class _ChunkChoice(ResponseBody):
    index: int
    finish_reason: FinishReason | None = Field(description="null except in the last chunk of a choice")
    mavis: ChoiceReport | None = Field(None, description="in the last chunk of a choice only")


class ChatChunkChoice(_ChunkChoice):
    delta: Delta
    logprobs: ChatLogprobs | None


class TextChunkChoice(_ChunkChoice):
    text: str
    logprobs: TextLogprobs | None


class _Chunk(_Head):
    mavis: AppliedSteering | None = Field(None, description="in the last chunk of a choice only")
    usage: Usage | None = Field(None, description="in the last chunk only, if stream_options ask for it")


class ChatChunk(_Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextChunk(_Chunk):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]


# --- lists, health, errors --------------------------------------------------------------------------------------------


class ModelObject(ResponseBody):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(ResponseBody):
    object: Literal["list"]
    data: list[ModelObject]


class Scale(ResponseBody):
    """Of the reward, over the training trees: values are in its standard deviations."""

    mean: float
    sd: float


class Gate(ResponseBody):
    """How an iteration did on validation prompts, beside the one before it."""

    soft_value: float = Field(description="E[reward - KL / beta], in standard deviations of the reward")
    num_prompts: int
    compared_with: int | None = Field(description="the iteration before; null: none was published")
    difference: float | None = Field(description="soft value less that of the iteration before")
    low: float | None = Field(description="lower end of the 95 % interval of the difference")
    high: float | None


class ObjectiveObject(ResponseBody):
    id: str
    object: Literal["objective"]
    version: str
    iteration: int
    distilled: bool
    reward: dict[str, Any] = Field(description="the objective's reward, as the config has it")
    scale: Scale
    max_tokens: int = Field(description="longest answer that the value model was trained on")
    explained_variance: float | None = Field(description="of the value model, on validation trees")
    gate: Gate | None
    value_replicas: int | None = Field(description="running value replicas; null: colocated, or unknown")


class ObjectiveList(ResponseBody):
    object: Literal["list"]
    data: list[ObjectiveObject]


class Health(ResponseBody):
    status: Literal["ok"]
    model: str
    running: int = Field(description="rows in use, of one base replica")
    waiting: int = Field(description="rows that wait there")


class Error(ResponseBody):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the field of the request at fault")
    code: str | None


class ErrorBody(ResponseBody):
    error: Error


def chunk_schemas() -> dict[str, Any]:
    """The schemas of streamed chunks, which FastAPI does not collect, for `components` of /openapi.json."""
    chunks: list[tuple[type[BaseModel], Literal["validation"]]] = [(ChatChunk, "validation"), (TextChunk, "validation")]
    _, schemas = models_json_schema(chunks, ref_template="#/components/schemas/{model}")
    return schemas["$defs"]
