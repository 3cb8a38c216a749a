"""Requests generated from the OpenAPI description and from the steering fields: none may be answered by 5xx."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.chaos import fuzz_openapi
from benchmarks.chaos.cluster import tiny_service
from benchmarks.chaos.fuzz_fields import request_bodies
from benchmarks.common.command import headline_table, say
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table

NUM_CLIENTS = 4
TIMEOUT_S = 60.0
MAX_TOKENS = 64  # of answers whose request sets no limit
MOST_KEPT = 20  # faults that are stored in full

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Scale:
    requests: int  # at least; half of them from schemathesis, not counting the boundary cases
    limits: bool  # whether boundary cases are added


FULL = Scale(2000, True)
QUICK = Scale(240, False)


@dataclass(frozen=True)
class FuzzResult:
    """The response to one request."""

    source: str
    route: str
    status: int | None  # None: no response
    request: str = ""  # only if the response has a fault
    fault: str = ""  # difference from the description, or how the connection failed

    @property
    def is_failure(self) -> bool:
        """Whether the service failed, whatever the request was."""
        return self.status is None or self.status >= 500


def measure(scale: Scale, number: int) -> dict[str, Any]:
    with tiny_service(MAX_TOKENS) as service, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = list(pool.map(lambda send: send(), _openapi_requests(service.url, service.model, scale, number)))
        say(f"{len(found)} requests from the description: {dict(Counter(result.status for result in found))}")
        bodies = draw_examples(request_bodies(service.model), scale.requests - scale.requests // 2, number)
        with httpx.Client(base_url=service.url, timeout=TIMEOUT_S, trust_env=False) as http:
            found += pool.map(lambda request: _post(http, *request), bodies)
            health = http.get("/health").status_code
    results = summarise(found, health)
    say(headline_table({key: figure for key, figure in results.items() if key not in ("statuses", "faults")}))
    for fault in results["faults"]:
        say(f"{fault['status']} {fault['route']}\n{fault['request']}\n{fault['fault']}")
    return {**results, "seed": number, "scale": asdict(scale)}


def summarise(found: Sequence[FuzzResult], health: int) -> dict[str, Any]:
    """The figures; `health` is the status of /health after all requests."""
    counts = Counter((result.source, str(result.status or "none")) for result in found)
    faults = [result for result in found if result.fault or result.is_failure]
    failures = sum(result.is_failure for result in found)
    return {
        "requests": len(found),
        "failures_5xx": failures,
        "not_as_described": sum(bool(result.fault) and not result.is_failure for result in found),
        "is_healthy": health == 200,
        "is_kept": not faults and health == 200,
        "statuses": {
            source: {status: count for (of, status), count in sorted(counts.items()) if of == source}
            for source in sorted({result.source for result in found})
        },
        "faults": [asdict(result) for result in faults[:MOST_KEPT]],
    }


def draw_examples(strategy: st.SearchStrategy[Drawn], count: int, number: int) -> list[Drawn]:
    """`count` examples, or all if there are fewer; they depend on the seed only."""
    found: list[Drawn] = []

    @seed(number)
    @settings(
        max_examples=max(count, 1),
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def keep(example: Drawn) -> None:
        found.append(example)

    keep()
    return found[:count]


def _openapi_requests(url: str, model: str, scale: Scale, number: int) -> Iterable[Callable[[], FuzzResult]]:
    """Half of the requests, mostly to routes with a body."""
    from benchmarks.chaos.fuzz_openapi import ApiCase

    schema = fuzz_openapi.of_service(url)
    operations = fuzz_openapi.operations(schema)
    posts = [operation for operation in operations if operation.method == "post"]
    cases: list[ApiCase] = []
    for operation in operations:
        if scale.limits:
            cases += fuzz_openapi.boundary_cases(operation)
        if operation not in posts:
            cases += draw_examples(fuzz_openapi.made_up(operation), 20, number)
    missing = max(scale.requests // 2 - len(cases), 0) if not scale.limits else scale.requests // 2
    for operation in posts:
        cases += draw_examples(fuzz_openapi.made_up(operation), -(-missing // len(posts)), number)
    return [lambda case=case: _call(fuzz_openapi.answerable(case, model)) for case in cases]  # type: ignore[misc]


def _call(case: Any) -> FuzzResult:
    import requests
    from schemathesis.errors import FailureGroup

    route, curl = case.operation.label, case.as_curl_command()
    try:
        response = case.call(timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return FuzzResult("description", route, None, curl, f"{type(error).__name__}: {error}")
    try:
        case.validate_response(response)
    except FailureGroup as faults:
        return FuzzResult("description", route, response.status_code, curl, str([str(f) for f in faults.exceptions]))
    return FuzzResult("description", route, response.status_code)


def _post(http: httpx.Client, path: str, body: Mapping[str, Any]) -> FuzzResult:
    content = json.dumps(body)
    try:
        response = http.post(path, content=content.encode(), headers={"content-type": "application/json"})
    except httpx.HTTPError as error:
        return FuzzResult("steering fields", path, None, content, f"{type(error).__name__}: {error}")
    fault = fault_of(response)
    return FuzzResult("steering fields", path, response.status_code, content if fault else "", fault)


def fault_of(response: httpx.Response) -> str:
    """What is wrong with a response, error responses included; empty if nothing is."""
    text = response.text
    if response.status_code >= 500:
        return text[:1000]
    if response.status_code != 200:
        known = _json(text).get("error")
        is_error = isinstance(known, dict) and known.keys() == {"message", "type", "param", "code"}
        return "" if is_error else f"not an error in OpenAI's format: {text[:1000]}"
    if response.headers["content-type"].startswith("text/event-stream"):
        return "" if text.endswith("data: [DONE]\n\n") else f"stream without [DONE]: {text[-1000:]}"
    return "" if _json(text).get("choices") else f"no answer: {text[:1000]}"


def _json(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def page(results: Mapping[str, Any]) -> str:
    statuses = results["statuses"]
    columns = sorted({status for counts in statuses.values() for status in counts})
    rows = [[source, *(str(counts.get(status, 0)) for status in columns)] for source, counts in statuses.items()]
    return (
        "## Fuzzed requests\n\n"
        f"{results['requests']} requests with seed {results['seed']} over HTTP to the service with a tiny random "
        "model, generated from its own `/openapi.json` (schemathesis: every field at and beyond its limits, valid and "
        "invalid bodies) and from the steering fields (hypothesis). Every response must have a status below 500 and "
        "match the description.\n\n"
        f"{results['failures_5xx']} were answered by 5xx or not at all; {results['not_as_described']} other responses "
        "did not match the description.\n\n"
        f"{table(['requests from', *columns], rows)}\n\n"
        f"Measured with `{results['command']}` on {machine_line(results)}."
    )
