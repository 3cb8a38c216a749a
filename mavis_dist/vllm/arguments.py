"""What a request to vLLM asks for: `vllm_xargs` in a body, `SamplingParams.extra_args` in Python. No import of vLLM."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from mavis_dist.decode import Request, RequestError, SamplingParams, Scorer
from mavis_dist.decode.validate import Bounds, validate
from mavis_dist.types import MAX_COUNT, parse_weights
from mavis_dist.vllm.served import Served

WEIGHTS = "objective_weights"
PREFIX = "vllm_xargs"


class VllmParams(Protocol):
    """The parts of vLLM's SamplingParams that steering depends on."""

    n: int
    temperature: float
    top_k: int  # 0 or less: off
    top_p: float
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    ignore_eos: bool
    extra_args: dict[str, Any] | None


def _weights(given: Any) -> Any:
    """Bodies cannot hold a mapping: `positive=0.7,brief=0.3`, or a list of such parts."""
    if isinstance(given, str):
        return parse_weights(given)
    if isinstance(given, Sequence):
        return parse_weights(",".join(map(str, given)))
    return given


def _cap(given: Any) -> Any:
    """Bodies cannot hold null either."""
    return None if given == "none" else given


class Arguments(BaseModel):
    """The fields of this project's own endpoint, which means the same by them (docs/http-api.md)."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)  # bounds are checked with those of all requests

    objective_weights: Annotated[dict[str, float], BeforeValidator(_weights)]
    beta: float | None = None
    tilt_cap: Annotated[float | None, BeforeValidator(_cap)] = math.nan  # nan: not given
    residual_cap: Annotated[float | None, BeforeValidator(_cap)] = math.nan
    scorer: Literal["full", "lazy", "predicted", "qhead"] = "lazy"
    guide_every: int = 1
    top_k: int | None = None
    seed: int | None = None


FIELDS = tuple(Arguments.model_fields)
FOREIGN = {
    "preferences": "sentences need further rows of the base model, which vLLM does not offer: use this project's own "
    "service",
    "preference_params": "there are no preferences in vLLM: use this project's own service",
}


def request_of(params: VllmParams, served: Served, vocabulary: int | None = None) -> Request | None:
    """The steering that a request asks for, valid, with the prompt of another; None if it asks for none.

    Raises:
        RequestError: naming the argument, its value and the remedy.
    """
    given = params.extra_args or {}
    _refuse_misspelt(given)
    if given.get(WEIGHTS) is None:
        return None
    arguments = _parse(given)
    _refuse_unsteerable(params, arguments)
    request = Request(
        "",
        (0,),
        arguments.objective_weights,
        served.steer.beta if arguments.beta is None else arguments.beta,
        _given(arguments.tilt_cap, served.steer.tilt_cap),
        SamplingParams(
            max_tokens=1,
            temperature=params.temperature,
            top_k=_top_k(arguments, params, vocabulary),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=arguments.seed if arguments.seed is not None else params.seed,
        ),
        scorer=Scorer(arguments.scorer),
        residual_cap=_given(arguments.residual_cap, served.steer.residual_cap),
        guide_every=arguments.guide_every,
    )
    try:
        valid = validate(request, Bounds(served.folders.keys(), MAX_COUNT, served.students))
    except RequestError as error:
        raise RequestError(f"{PREFIX}.{error.field}" if error.field in FIELDS else error.field, error.message) from None
    return valid if valid.is_guided else None


def is_cut_by_vllm(params: VllmParams, request: Request) -> bool:
    """Whether vLLM's own filters would remove candidates after the tilt, and so change what a request asks for."""
    return params.top_p < 1 or params.min_p > 0 or 0 < params.top_k < request.params.top_k


def _parse(given: Mapping[str, Any]) -> Arguments:
    try:
        return Arguments.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field, problem = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        raise RequestError(
            f"{PREFIX}.{field}", f"is {given.get(field)!r:.200}; {problem[0].lower()}{problem[1:]}"
        ) from None


def _given(value: float | None, default: float | None) -> float | None:
    return default if value is not None and math.isnan(value) else value


def _top_k(arguments: Arguments, params: VllmParams, vocabulary: int | None) -> int:
    """Of the candidates: this project's, or else vLLM's where it has any."""
    if arguments.top_k is not None:
        return arguments.top_k
    top_k = params.top_k if params.top_k > 0 else SamplingParams.top_k
    return top_k if vocabulary is None else min(top_k, vocabulary)


def _refuse_misspelt(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in FOREIGN:
            raise RequestError(f"{PREFIX}.{name}", FOREIGN[name])
        # Other names may belong to somebody else.
        if name not in FIELDS and (close := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)):
            raise RequestError(f"{PREFIX}.{name}", f"there is no such argument; did you mean {close[0]!r}?")
    alone = [name for name in FIELDS if name in given and name != WEIGHTS]
    if alone and given.get(WEIGHTS) is None:
        raise RequestError(
            f"{PREFIX}.{alone[0]}", f"has no effect without {WEIGHTS}: add them, such as positive=0.7,brief=0.3"
        )


def _refuse_unsteerable(params: VllmParams, arguments: Arguments) -> None:
    for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
        if getattr(params, name) != neutral:
            raise RequestError(name, f"is {getattr(params, name)!r}; with {WEIGHTS} use {neutral}")
    if params.ignore_eos:
        raise RequestError(
            "ignore_eos", f"is true; with {WEIGHTS} use false: values know nothing behind an answer's end"
        )
    if arguments.seed is not None and params.n > 1:
        raise RequestError(
            f"{PREFIX}.seed",
            f"is {arguments.seed}; with n = {params.n} give vLLM's own seed, of which each answer has its own",
        )
