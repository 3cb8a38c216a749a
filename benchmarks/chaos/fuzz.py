"""Requests made up from the service's description and from its steering fields: none may end in a failure of ours."""

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
from benchmarks.chaos.cluster import deployment
from benchmarks.chaos.fuzz_fields import questions
from benchmarks.common.command import headline_table, say
from benchmarks.common.markdown import table

NUM_CLIENTS = 4
PATIENCE_S = 60.0
MAX_TOKENS = 64  # of an answer that asks for no limit
MOST_KEPT = 20  # faults that are written down in full

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Scale:
    requests: int  # at least; half are made up by schemathesis, and the cases at limits come on top
    limits: bool  # whether they do


FULL = Scale(2000, True)
QUICK = Scale(240, False)


@dataclass(frozen=True)
class Answered:
    """What came of a request."""

    source: str
    route: str
    status: int | None  # none: no response at all
    asked: str = ""  # the request, where something is wrong with its answer
    fault: str = ""  # what the description does not allow, or how the connection failed

    @property
    def is_failure(self) -> bool:
        """Of ours: no client can be blamed for it."""
        return self.status is None or self.status >= 500


def measure(scale: Scale, number: int) -> dict[str, Any]:
    with deployment(MAX_TOKENS) as served, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(lambda ask: ask(), _described_requests(served.url, served.model, scale, number)))
        say(f"{len(answers)} requests from the description: {dict(Counter(answer.status for answer in answers))}")
        bodies = drawn(questions(served.model), scale.requests - scale.requests // 2, number)
        with httpx.Client(base_url=served.url, timeout=PATIENCE_S, trust_env=False) as http:
            answers += pool.map(lambda question: _post(http, *question), bodies)
            health = http.get("/health").status_code
    results = conclude(answers, health)
    say(headline_table({key: figure for key, figure in results.items() if key not in ("statuses", "faults")}))
    for fault in results["faults"]:
        say(f"{fault['status']} {fault['route']}\n{fault['asked']}\n{fault['fault']}")
    return {**results, "seed": number, "scale": asdict(scale)}


def conclude(answers: Sequence[Answered], health: int) -> dict[str, Any]:
    """The figures; `health` is the status of the service's health when all was over."""
    counts = Counter((answer.source, str(answer.status or "none")) for answer in answers)
    faults = [answer for answer in answers if answer.fault or answer.is_failure]
    failures = sum(answer.is_failure for answer in answers)
    return {
        "requests": len(answers),
        "failures_5xx": failures,
        "not_as_described": sum(bool(answer.fault) and not answer.is_failure for answer in answers),
        "is_healthy": health == 200,
        "is_kept": not faults and health == 200,
        "statuses": {
            source: {status: count for (of, status), count in sorted(counts.items()) if of == source}
            for source in sorted({answer.source for answer in answers})
        },
        "faults": [asdict(answer) for answer in faults[:MOST_KEPT]],
    }


def drawn(strategy: st.SearchStrategy[Drawn], count: int, number: int) -> list[Drawn]:
    """So many examples, or fewer where there are no more; the seed decides which."""
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


def _described_requests(url: str, model: str, scale: Scale, number: int) -> Iterable[Callable[[], Answered]]:
    """Half of the requests, mostly of those routes that have a body."""
    from benchmarks.chaos.fuzz_openapi import MadeUp

    schema = fuzz_openapi.of_service(url)
    operations = fuzz_openapi.operations(schema)
    posts = [operation for operation in operations if operation.method == "post"]
    cases: list[MadeUp] = []
    for operation in operations:
        if scale.limits:
            cases += fuzz_openapi.boundary_cases(operation)
        if operation not in posts:
            cases += drawn(fuzz_openapi.made_up(operation), 20, number)
    missing = max(scale.requests // 2 - len(cases), 0) if not scale.limits else scale.requests // 2
    for operation in posts:
        cases += drawn(fuzz_openapi.made_up(operation), -(-missing // len(posts)), number)
    return [lambda case=case: _call(fuzz_openapi.answerable(case, model)) for case in cases]  # type: ignore[misc]


def _call(case: Any) -> Answered:
    import requests
    from schemathesis.errors import FailureGroup

    route, curl = case.operation.label, case.as_curl_command()
    try:
        response = case.call(timeout=PATIENCE_S)
    except requests.RequestException as error:
        return Answered("description", route, None, curl, f"{type(error).__name__}: {error}")
    try:
        case.validate_response(response)
    except FailureGroup as faults:
        return Answered("description", route, response.status_code, curl, str([str(f) for f in faults.exceptions]))
    return Answered("description", route, response.status_code)


def _post(http: httpx.Client, path: str, body: Mapping[str, Any]) -> Answered:
    content = json.dumps(body)
    try:
        response = http.post(path, content=content.encode(), headers={"content-type": "application/json"})
    except httpx.HTTPError as error:
        return Answered("steering fields", path, None, content, f"{type(error).__name__}: {error}")
    fault = fault_of(response)
    return Answered("steering fields", path, response.status_code, content if fault else "", fault)


def fault_of(response: httpx.Response) -> str:
    """What is wrong with an answer, refusals included; empty: nothing."""
    text = response.text
    if response.status_code >= 500:
        return text[:1000]
    if response.status_code != 200:
        known = _json(text).get("error")
        is_error = isinstance(known, dict) and known.keys() == {"message", "type", "param", "code"}
        return "" if is_error else f"no error in OpenAI's shape: {text[:1000]}"
    if response.headers["content-type"].startswith("text/event-stream"):
        return "" if text.endswith("data: [DONE]\n\n") else f"a stream without an end: {text[-1000:]}"
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
        f"{results['requests']} requests with seed {results['seed']} over HTTP to the service with a tiny random model "
        "made up from its own `/openapi.json` (schemathesis: every field at and beyond its limits, good and bad "
        "bodies) and from the steering fields (hypothesis). An answer has to be below 500 and as fuzz_openapi.\n\n"
        f"{results['failures_5xx']} were answered by 5xx or not at all; {results['not_as_described']} otherwise than "
        "described.\n\n"
        f"{table(['requests from', *columns], rows)}\n\n"
        "Repeat with `python -m benchmarks.chaos --parts fuzz`."
    )
