"""Requests generated from the OpenAPI description, from the fields, as bytes, and for chat templates of many kinds.

None may be answered by 5xx.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.chaos import fuzz_openapi
from benchmarks.chaos.cluster import tiny_service
from benchmarks.chaos.fuzz_fields import Sent, conversations, request_bodies, sent_bytes
from benchmarks.common.command import headline_table, say
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table

NUM_CLIENTS = 4
TIMEOUT_S = 60.0
MAX_TOKENS = 64  # of answers whose request sets no limit
MOST_KEPT = 20  # faults that are stored in full

Drawn = TypeVar("Drawn")

# Of chat templates: each refuses, drops or reads something in a way of its own.
TEMPLATES = {
    "refuses system turns": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    ),
    "drops system turns": (
        "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    ),
    "reads parts": (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    ),
    "writes control tokens": (
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    ),
    "rewrites texts": "{% for m in messages %}{{ m['content'].split('H')[-1] | upper }} {% endfor %}",
    "fails": "{{ messages[1]['content'][0] + 1 }}",
}


@dataclass(frozen=True)
class Scale:
    requests: int  # at least; a third of them from schemathesis, not counting the boundary cases
    limits: bool  # whether boundary cases are added


FULL = Scale(3000, True)
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
    share = scale.requests // 3
    with tiny_service(MAX_TOKENS) as service, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = list(pool.map(lambda send: send(), _openapi_requests(service.url, service.model, scale, number)))
        say(f"{len(found)} requests from the description: {dict(Counter(result.status for result in found))}")
        bodies = [_sent(*asked) for asked in draw_examples(request_bodies(service.model), share, number)]
        raw = draw_examples(sent_bytes(service.model), share // 2, number)
        with httpx.Client(base_url=service.url, timeout=TIMEOUT_S, trust_env=False) as http:
            found += pool.map(lambda sent: _post(http, "steering fields", *sent), bodies)
            found += pool.map(lambda sent: _post(http, "bytes", *sent), raw)
            health = http.get("/health").status_code
    found += template_requests(scale.requests - share - share // 2 - scale.requests // 3, number)
    results = summarise(found, health)
    say(headline_table({key: figure for key, figure in results.items() if key not in ("statuses", "faults")}))
    for fault in results["faults"]:
        say(f"{fault['status']} {fault['route']}\n{fault['request']}\n{fault['fault']}")
    return {**results, "seed": number, "scale": asdict(scale)}


def template_requests(count: int, number: int) -> list[FuzzResult]:
    """Conversations under every template, over HTTP to a service in this process."""
    from tests.local import NAME, LocalService, listening

    found: list[FuzzResult] = []
    for template in TEMPLATES.values():
        with tempfile.TemporaryDirectory(prefix="mavis-chaos-") as folder:
            service = LocalService(Path(folder), template)
            with listening(service.app(log_access=False)) as url, httpx.Client(base_url=url, trust_env=False) as http:
                asked = draw_examples(conversations(NAME), -(-count // len(TEMPLATES)), number)
                found += [_post(http, "templates", *_sent(*one)) for one in asked]
            service.loop.stop()
    return found


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
    """A third of the requests, mostly to routes with a body."""
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
    share = scale.requests // 3
    missing = share if scale.limits else max(share - len(cases), 0)
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


def _sent(path: str, body: Mapping[str, Any]) -> Sent:
    return path, json.dumps(body).encode(), {"content-type": "application/json"}


def _post(http: httpx.Client, source: str, path: str, content: bytes, headers: Mapping[str, str]) -> FuzzResult:
    shown = content[:2000].decode(errors="replace")
    try:
        response = http.post(path, content=content, headers=dict(headers))
    except httpx.HTTPError as error:
        return FuzzResult(source, path, None, shown, f"{type(error).__name__}: {error}")
    fault = fault_of(response)
    return FuzzResult(source, path, response.status_code, shown if fault else "", fault)


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
        "invalid bodies), from the steering fields, as bytes that are no JSON, and as conversations under "
        f"{len(TEMPLATES)} chat templates (hypothesis). Every response must have a status below 500 and "
        "match the description.\n\n"
        f"{results['failures_5xx']} were answered by 5xx or not at all; {results['not_as_described']} other responses "
        "did not match the description.\n\n"
        f"{table(['requests from', *columns], rows)}\n\n"
        f"Measured with `{results['command']}` on {machine_line(results)}."
    )
