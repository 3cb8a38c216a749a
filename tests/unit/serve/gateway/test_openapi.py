"""Whatever is asked of any route: an answer as /openapi.json describes it, and never a failure of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import BaseSchema, Case
from schemathesis.core.failures import FailureGroup

from benchmarks.chaos.fuzz_openapi import answerable, boundary_cases, made_up, of_app, operations
from serve.gateway import api_keys, watched
from serve.gateway.api_keys import Keys
from tests.local import NAME

OPERATIONS = [
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /v1/objectives",
    "POST /v1/chat/completions",
    "POST /v1/completions",
]
FUZZED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=60
)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def headers(key_file) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_keys.add(key_file, 'ann')}"}


@pytest.fixture(scope="module")
def described(service, headers, key_file) -> Iterator[BaseSchema]:
    app = service.app(keys=Keys(key_file), log_access=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched, "_node_addresses", list)  # a cluster without nodes
        yield of_app(watched.watched_api(app, lambda *figure, **labels: None))


def check(case: Case, headers: dict[str, str]) -> None:
    """Raises schemathesis's FailureGroup, with the request in curl's words."""
    answerable(case, NAME).call_and_validate(headers=headers)


def test_an_answer_that_is_not_as_described_is_noticed(service):
    app = service.app(log_access=False)
    [health] = (route for route in app.routes if getattr(route, "path", "") == "/health")
    spoilt = app.router.routes[app.router.routes.index(health)]
    answer = spoilt.dependant.call

    async def more() -> dict:
        return {**await answer(), "mood": "good"}

    spoilt.dependant.call = more
    case = next(iter(boundary_cases(of_app(app).find_operation_by_label("GET /health"))))
    with pytest.raises(FailureGroup, match="mood"):
        check(case, {})


def test_all_routes_are_asked(described):
    assert sorted(operation.label for operation in operations(described)) == OPERATIONS


@pytest.mark.parametrize("label", OPERATIONS)
def test_limits_of_fields(described, headers, label):
    for case in boundary_cases(described.find_operation_by_label(label)):
        check(case, headers)


@pytest.mark.parametrize("label", OPERATIONS)
@FUZZED
@given(data=st.data())
def test_made_up_requests(described, headers, label, data):
    check(data.draw(made_up(described.find_operation_by_label(label))), headers)
