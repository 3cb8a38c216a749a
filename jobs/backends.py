"""What answers a question of jobs.ask: a running service over HTTP, or a finished run's models in this process.

Light to import: torch is loaded with a run, httpx with a service.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis_dist.types import UserError

if TYPE_CHECKING:
    import httpx

URL, RUN = "http://127.0.0.1:8000", "runs/quickstart"
CONNECT_S, HEALTH_S, ANSWER_S = 5, 10, 600


class NoService(UserError):
    """No healthy service of this project is at an address."""


@dataclass(frozen=True)
class Asked:
    """One question with its steering; None: the default of the service or run."""

    question: str
    seed: int
    weights: Mapping[str, float]
    preferences: Mapping[str, float]  # text -> weight
    beta: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None

    @property
    def steering(self) -> str:
        """`positive 0.7, brief 0.3`; empty: nothing steers."""
        preferences = {f'"{text}"': weight for text, weight in self.preferences.items()}
        return ", ".join(f"{name} {weight:g}" for name, weight in {**self.weights, **preferences}.items())


@dataclass(frozen=True)
class Report:
    """What steering did to an answer."""

    divergence: float | None  # KL from the base model, nats; None: unknown, as at temperature 0
    values: Mapping[str, float | None]  # objective -> predicted reward, in standard deviations


Write = Callable[[str], None]


@dataclass(frozen=True)
class Backend:
    """A service or run that is ready to answer."""

    objectives: Mapping[str, int]  # name -> longest answer that its value model was trained on, in tokens
    ask: Callable[[Asked, Write], Report]  # writes the answer piece by piece; raises UserError


def choose(url: str | None, run: str | None, key: str = "") -> Backend:
    """A service, or a run's models in this process; by default the service of this machine, else the quickstart run.

    Raises UserError.
    """
    if url is not None:
        return service(url, key)
    if run is not None:
        return local(run)
    try:
        return service(URL, key)
    except NoService:
        if not Path(RUN).is_dir():
            raise UserError(
                f"no service answers at {URL} and there is no finished run in {RUN}: start a service with "
                "`make serve`, make a run with `make quickstart`, or give --url or --run"
            ) from None
    print(f"no service answers at {URL}: loading {RUN}", file=sys.stderr)
    return local(RUN)


def local(run: str) -> Backend:
    """The models of a finished run in this process."""
    from mavis_dist.llm import LLM

    llm = LLM.from_run(run)

    def ask(asked: Asked, write: Write) -> Report:
        stream = llm.stream(
            asked.question,
            asked.weights,
            preferences=asked.preferences,
            beta=asked.beta,
            seed=asked.seed,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            system=asked.system,
        )
        for piece in stream:
            write(piece)
        return Report(stream.answer.divergence, stream.answer.values)

    return Backend(llm.trained_tokens, ask)


def service(url: str, key: str = "") -> Backend:
    """A running service of this project, at its root or at /v1; raises NoService, or UserError if it wants a key."""
    import httpx

    if not (key.isascii() and key.isprintable()):
        raise UserError("the API key holds characters that no key has: copy it again")
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {key}"} if key else {}

    def call(method: str, path: str, limit_s: float, use: Callable[[httpx.Response], Any], **body: Any) -> Any:
        timeout = httpx.Timeout(limit_s, connect=CONNECT_S)
        try:
            with httpx.stream(
                method, f"{url}{path}", headers=headers, timeout=timeout, trust_env=False, **body
            ) as response:
                if response.status_code != 200:
                    raise UserError(f"{_refusal(response)} ({url})")
                return use(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"the service at {url} does not answer ({error}): check that it runs there") from None

    def read_json(response: httpx.Response) -> Any:
        return json.loads(response.read())

    try:
        model = call("GET", "/health", HEALTH_S, read_json)["model"]
    except UserError as error:
        raise NoService(str(error)) from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise NoService(f"{url} is not a service of mavis_dist: give the address of one") from None
    served = call("GET", "/v1/objectives", HEALTH_S, read_json)["data"]
    objectives = {one["id"]: one["max_tokens"] for one in served}

    def ask(asked: Asked, write: Write) -> Report:
        def read(response: httpx.Response) -> Report:
            return _follow(events(response.iter_bytes()), write)

        return call("POST", "/v1/chat/completions", ANSWER_S, read, json=body(model, asked))

    return Backend(objectives, ask)


def body(model: str, asked: Asked) -> dict[str, Any]:
    """Of the HTTP request."""
    system = [] if asked.system is None else [{"role": "system", "content": asked.system}]
    fields = {
        "model": model,
        "messages": [*system, {"role": "user", "content": asked.question}],
        "objective_weights": asked.weights,
        "preferences": [{"text": text, "weight": weight} for text, weight in asked.preferences.items()],
        "beta": asked.beta,
        "seed": asked.seed,
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "stream": True,
    }
    return {name: value for name, value in fields.items() if value is not None}


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The server-sent events of a completion; raises UserError unless the last one is [DONE].

    Lines end in a line feed alone: other line separators of Unicode may occur inside an answer.
    """
    left = b""
    for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        for data in (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")):
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise UserError("the service ended the answer before it was complete: ask again, with the same --seed")


def _follow(events: Iterable[dict[str, Any]], write: Write) -> Report:
    report = Report(None, {})
    for event in events:
        if "error" in event:
            raise UserError(event["error"]["message"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                write(text)
            if "mavis" in choice:
                report = Report(choice["mavis"]["divergence"], choice["mavis"]["values"])
    return report


def _refusal(response: httpx.Response) -> str:
    """What the service says is wrong."""
    try:
        message = str(json.loads(response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the service answers with status {response.status_code}"
    return f"{message}; give --key or set MAVIS_API_KEY" if response.status_code == 401 else message
