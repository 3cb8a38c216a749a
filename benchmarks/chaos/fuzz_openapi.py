"""Requests made up from the service's own description, by schemathesis. Loads it: import this where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import APIOperation, BaseSchema, Case, GenerationMode
from schemathesis.core.result import Ok

Operation = APIOperation[Any, Any, Any, Any]
MadeUp = Case[Operation]

MAX_TOKENS = 3  # of an answer: how it ends is what matters here
SETTINGS = {
    "analysis": {"constants": {"enabled": False}},  # cases depend on nothing but the description
    "generation": {"with-security-parameters": False},  # the caller brings a key, or none is asked for
    # What a schema cannot say is refused, too: names that are not known, fields that exclude each other.
    "checks": {"positive_data_acceptance": {"enabled": False}},
}


def of_app(app: Any) -> BaseSchema:
    """The description of an ASGI app, whose cases are asked of it in this process."""
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config.from_dict(SETTINGS))


def of_service(url: str) -> BaseSchema:
    """The description of a service; `url` has no path."""
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=schemathesis.Config.from_dict(SETTINGS))


def operations(schema: BaseSchema) -> list[Operation]:
    return [operation.ok() for operation in schema.get_all_operations() if isinstance(operation, Ok)]


def made_up(operation: Operation) -> st.SearchStrategy[MadeUp]:
    """Good ones and, where a body can be wrong, bad ones."""
    modes = GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]
    return st.one_of(*(operation.as_strategy(mode) for mode in modes))


def boundary_cases(operation: Operation) -> Iterator[MadeUp]:
    """Every field at, beyond and without its limits, and methods that the route does not have. Not random."""
    generation = operation.schema.config.generation
    yield from operation.schema.iter_coverage_cases(
        operation, generation_modes=list(GenerationMode), generation_config=generation
    )


def answerable(case: MadeUp, model: str) -> MadeUp:
    """The same case about a model that is served, with a short answer: whether it fits the description stays."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        asked = body.get(limit)
        is_long = asked is None or (isinstance(asked, int) and asked > MAX_TOKENS)
        case.body = {**body, "model": model, **({limit: MAX_TOKENS} if is_long else {})}
    return case
