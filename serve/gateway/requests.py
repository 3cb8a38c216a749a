"""Bodies of requests as pydantic models that refuse unknown fields; those of responses are in `responses`.

Knows nothing of Ray, models or tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mavis_dist.sections import MAX_N, MAX_PREFERENCES
from mavis_dist.types import MAX_COUNT, UserError, parse_weights, text_fault
from serve.gateway.protocol import ApiError

if TYPE_CHECKING:
    from mavis_dist.models.chat import ChatOptions

MAX_TOP_LOGPROBS = 20
UNSUPPORTED = "unsupported"  # type of the errors that name a field of NEUTRAL or INSTEAD


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    # Unsupported fields with the values that change nothing besides null: clients send them. Others are refused.
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # Unsupported fields with what to do instead of them.
    INSTEAD: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise PydanticCustomError("object", "use an object{fields}", {"fields": cls._required()})
        for name, field in cls.model_fields.items():
            if name in ("role", "type") and name in body and body[name] not in get_args(field.annotation):
                return {name: body[name]}  # an object of a kind that is not supported: its fields do not matter
        given = {name: value for name, value in body.items() if value is not None or name in cls.model_fields}
        for name, value in given.items():
            if name in cls.NEUTRAL and value not in cls.NEUTRAL[name]:
                remedy = f"remove it, or give {json.dumps(cls.NEUTRAL[name][0])}"
            elif name in cls.INSTEAD:
                remedy = cls.INSTEAD[name]
            else:
                continue
            raise PydanticCustomError(UNSUPPORTED, "is not supported", {"field": name, "remedy": remedy})
        return {name: value for name, value in given.items() if name not in cls.NEUTRAL}

    @classmethod
    def _required(cls) -> str:
        names = [repr(name) for name, field in cls.model_fields.items() if field.is_required()]
        return f" with {' and '.join(names)}" if names else ""


def _encodable(text: str) -> str:
    if fault := text_fault(text):
        raise ValueError(f"holds {fault}; remove it")
    return text


Encodable = Annotated[str, AfterValidator(_encodable)]  # a text for a tokenizer


class StreamOptions(Body):
    NEUTRAL = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class FlatArgs(Body):
    """Steering for clients that cannot send nested extras."""

    objective_weights: Annotated[str, Field(examples=["positive=0.7,brief=0.3"])]


class Preference(Body):
    """An objective given as a sentence."""

    text: Annotated[Encodable, Field(min_length=1, max_length=4000)]
    weight: float = 1.0


class PreferenceParams(Body):
    """How preferences steer. None: the preset's value."""

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
# One or several; a list in either case, so that an error names the text at fault.
StopText = Annotated[str, Field(min_length=1)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]
Stop = Annotated[StopTexts, BeforeValidator(_as_list, json_schema_input_type=StopText | StopTexts)]


class GenerationRequest(Body):
    """The fields of both endpoints. None: the server's default."""

    NEUTRAL = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "store": (False,),
        "service_tier": ("auto", "default"),
        # What vLLM and SGLang have beyond that.
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "detokenize": (True,),
        "stop_token_ids": ([],),
        "stop_regex": ([],),
        "bad_words": ([],),
        "include_stop_str_in_output": (False,),
        "no_stop_trim": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "return_hidden_states": (False,),
        "priority": (0,),
    }
    INSTEAD = {
        "max_new_tokens": "use max_tokens",
        "request_id": "send it as the header x-request-id",
        "rid": "send it as the header x-request-id",
    }

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        None, description="candidates of a token; 0 or -1: the whole vocabulary"
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="a label, like the next three fields; none of them changes the answer")
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    objective_weights: dict[str, float] | None = Field(
        None, description="objective (see /v1/objectives) -> weight >= 0; only their proportions count"
    )
    beta: Annotated[float, Field(ge=0)] | None = Field(
        None, description="strength: nats of tilt per standard deviation of reward; 0: the base model"
    )
    tilt_cap: Annotated[float, Field(gt=0)] | None = Field(
        None, description="most nats that a token can gain; lets the lazy scorer skip candidates"
    )
    preferences: Annotated[list[Preference], Field(max_length=MAX_PREFERENCES)] | None = Field(
        None, description="objectives given as sentences"
    )
    preference_params: PreferenceParams | None = Field(None, description="how the preferences steer")
    scorer: Literal["full", "lazy", "predicted", "qhead"] | None = Field(
        None, description="which candidates value models score; full and lazy generate the same tokens"
    )
    residual_cap: Annotated[float, Field(gt=0)] | None = Field(
        None, description="most nats by which a token can gain more than predicted, with the scorer predicted"
    )
    guide_every: Count | None = Field(
        None, description="tilt every so many tokens; the others come from the base model"
    )
    vllm_xargs: FlatArgs | None = Field(None, description="for clients that forbid nested extras")
    split_special_tokens: bool | None = Field(
        None,
        description="whether control tokens that a text spells stay text; default: true for messages, false for a "
        "prompt, which is the caller's as a whole",
    )

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported with each token; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def continues_prompt(self) -> bool:
        """Whether an answer's text goes on from the prompt's."""
        raise NotImplementedError

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def num_variants(self) -> int:
        """Rows that an answer takes: its own, and one per preference that steers it."""
        return 1 + sum(preference.weight != 0 for preference in self.preferences or ())

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

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
        try:
            return parse_weights(self.vllm_xargs.objective_weights)
        except UserError as error:
            raise ApiError(400, str(error), "vllm_xargs.objective_weights") from None


class TextPart(Body):
    type: Literal["text"]
    text: Encodable


def _content_kind(content: Any) -> str | None:
    return "(text)" if isinstance(content, str) else "(parts)" if isinstance(content, list) else None


Content = Annotated[
    Annotated[Encodable, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message='use a text, or a list of parts such as {"type": "text", "text": "..."}',
    ),
]


class Message(Body):
    # A response's message can be sent back unchanged.
    NEUTRAL = {
        "annotations": ([],),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def turn(self) -> dict[str, str]:
        """In the format of chat templates."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    NEUTRAL = {
        **GenerationRequest.NEUTRAL,
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "add_special_tokens": (False,),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
        "separate_reasoning": (True, False),
        "stream_reasoning": (True, False),
        "include_reasoning": (True, False),
    }
    INSTEAD = {
        **GenerationRequest.INSTEAD,
        "prompt": "give messages, or use /v1/completions",
        "best_of": "remove it, and use n",
        "suffix": "remove it; no endpoint has it",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    continue_final_message: bool | None = Field(
        None, description="the answer continues the last message, instead of being a message of its own"
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt with the start of an answer; default: true, unless a message is continued"
    )
    echo: bool | None = Field(
        None, description="begin the answer with the last message, if that is the assistant's and is continued"
    )

    @property
    def template_options(self) -> ChatOptions:
        continues = bool(self.continue_final_message)
        is_open = self.add_generation_prompt
        return {
            "continue_final_message": continues,
            "add_generation_prompt": not continues if is_open is None else is_open,
            "split_special_tokens": self.split_special_tokens is not False,
        }

    @property
    def echoed(self) -> str:
        """The text that an answer begins with."""
        last = self.messages[-1]
        return last.text if self.echo and self.continue_final_message and last.role == "assistant" else ""

    @property
    def continues_prompt(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @model_validator(mode="after")
    def _one_ending(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("give continue_final_message or add_generation_prompt, not both")
        return self

    @model_validator(mode="after")
    def _something_to_continue(self) -> ChatRequest:
        if self.continue_final_message and not self.messages[-1].text.strip():
            field = "continue_final_message"
            message = "the last message has no text to continue: leave out this field, or that message"
            raise PydanticCustomError("continued", message, {"field": field})
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        return self


Text = Annotated[Encodable, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "(text)"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "(ids)" if isinstance(first, (int, float)) else "(lists)" if isinstance(first, list) else "(texts)"


KINDS = ("(text)", "(texts)", "(ids)", "(lists)", "(parts)")  # in the paths of pydantic's errors
Prompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[Text], Field(min_length=1), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[TokenIds], Field(min_length=1), Tag("(lists)")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="use a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


class TextRequest(GenerationRequest):
    NEUTRAL = {
        **GenerationRequest.NEUTRAL,
        "best_of": (1,),
        "suffix": ("",),
        "add_special_tokens": (True,),
    }
    INSTEAD = {
        **GenerationRequest.INSTEAD,
        "messages": "give a prompt, or use /v1/chat/completions",
        "max_completion_tokens": "use max_tokens",
        "top_logprobs": "use logprobs, the number of alternatives",
    }

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="begin every answer with its prompt")

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """One or several, each as text or as token ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt  # type: ignore[list-item, return-value]

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * super().num_answers

    @property
    def continues_prompt(self) -> bool:
        return True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _no_log_probabilities_of_prompts(self) -> TextRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("log-probabilities of prompts are not computed: leave out echo or logprobs")
        return self


def refusal(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, an unsupported field first, as a 400 that names the field."""
    first = min(errors, key=lambda error: error["type"] not in (UNSUPPORTED, "extra_forbidden"))
    context = first.get("ctx", {})
    # Alternatives of a union end the path with the name of the type that was tried.
    path = [part for part in first["loc"] if part not in ("body", *KINDS)]
    path += [context["field"]] if "field" in context else []
    param = ".".join(str(part) for part in path) or None
    if first["type"] in (UNSUPPORTED, "extra_forbidden"):
        remedy = context.get("remedy", "remove it")
        return ApiError(400, f"the field {param!r} is not supported; {remedy}", param, "unsupported_field")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message = f"{first['input']!r:.100} is not supported; use {context['expected']}"
    return ApiError(400, f"{param}: {message}" if param else message, param)
