"""Ask a question in the terminal, and compare the steered answer with the base model's.

    python -m jobs.ask "How do I make good coffee?" --weights positive=0.7,brief=0.3 [--compare]
    python -m jobs.ask "How do I make good coffee?" --prefer "Answer like a pirate." --run runs/quickstart

The answer comes from a running service (--url), or from the models of a finished run loaded in this process (--run).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import arguments
from mavis_dist.types import UserError, parse_weights

if TYPE_CHECKING:
    import httpx

URL, RUN = "http://127.0.0.1:8000", "runs/quickstart"
INTERRUPTED, PIPE_CLOSED = 128 + 2, 128 + 13  # as a shell reports a process that SIGINT or SIGPIPE has ended
CONNECT_S, ANSWER_S = 5, 600


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
Backend = Callable[[Asked, Write], Report]  # writes the answer piece by piece


def main(argv: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    try:
        arguments.refusing(lambda: run(given))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # whoever read the answer has enough; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(PIPE_CLOSED) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ask",
        description="Ask a service or a finished run, and compare the steered answer with the base model's.",
        epilog="The answer goes to stdout; its cost and seed to stderr, or to stdout with --compare.",
    )
    parser.add_argument("question", nargs="?", help="default: read from a pipe, or asked for one after another")
    parser.add_argument("--weights", default="", metavar="NAME=W,...", help="such as positive=0.7,brief=0.3")
    parser.add_argument(
        "--prefer", action="append", default=[], metavar="TEXT", help="a preference in words; may be repeated"
    )
    parser.add_argument("--prefer-weights", metavar="W,...", help="a weight for each --prefer (default: all 1)")
    parser.add_argument("--compare", action="store_true", help="the base model's answer first, with the same seed")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--url", help=f"a running service (default: {URL} if one answers there)")
    place.add_argument("--run", help=f"a finished run's folder or fsspec URI (default without a service: {RUN})")
    parser.add_argument("--key", help="API key of the service (default: the environment variable MAVIS_API_KEY)")
    parser.add_argument("--seed", type=int, help="repeats an answer (default: random, printed)")
    parser.add_argument("--beta", type=_number, help="strength of the objectives (default: the service's or run's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=_number, help="0: the most likely tokens (default: 1)")
    parser.add_argument("--system", help="system text (default: the service's or run's)")
    return parser


def run(given: argparse.Namespace) -> None:
    """Raises UserError."""
    weights, preferences = _weights(given.weights), _preferences(given.prefer, given.prefer_weights)
    if given.compare and not (weights or preferences):
        raise UserError("--compare needs something that steers: give --weights or --prefer")
    is_interactive = given.question is None and sys.stdin.isatty()
    questions = _typed() if is_interactive else [_read(given.question)]
    backend = open_backend(given.url, given.run, given.key or os.environ.get("MAVIS_API_KEY", ""))
    for question in questions:
        seed = secrets.randbelow(10**6) if given.seed is None else given.seed
        asked = Asked(
            question, seed, weights, preferences, given.beta, given.max_tokens, given.temperature, given.system
        )
        try:
            answer(backend, asked, given.compare)
        except UserError as error:
            if not is_interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


def answer(backend: Backend, asked: Asked, is_compared: bool = False) -> None:
    """Print the answer as it comes, after the base model's if they are compared, and a line about its cost."""
    if is_compared:
        _print_block("base", backend, replace(asked, weights={}, preferences={}))
        report = _print_block(f"steered ({asked.steering})", backend, asked)
    else:
        report = backend(asked, _write)
        print(flush=True)
    print(summary(report, asked), file=sys.stdout if is_compared else sys.stderr)


def _print_block(head: str, backend: Backend, asked: Asked) -> Report:
    print(f"{head}\n{'-' * len(head)}", flush=True)
    report = backend(asked, _write)
    print("\n", flush=True)
    return report


def summary(report: Report, asked: Asked) -> str:
    """`[steering cost 8.1 nats; predicted reward: positive +0.52 sd; seed 7]`."""
    known = {name: value for name in asked.weights if (value := report.values.get(name)) is not None}
    values = ", ".join(f"{name} {value:+.2f} sd" for name, value in known.items())
    cost = "unknown" if report.divergence is None else f"{report.divergence:.1f} nats"
    parts = [f"steering cost {cost}" if asked.steering else "", f"predicted reward: {values}" if values else ""]
    return f"[{'; '.join(filter(None, (*parts, f'seed {asked.seed}')))}]"


def _write(piece: str) -> None:
    """What a model generates must not steer the terminal."""
    print("".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc"), end="", flush=True)


# --- the question -----------------------------------------------------------------------------------------------------


def _read(question: str | None) -> str:
    """The question that was given, or else what comes through the pipe."""
    try:
        text = sys.stdin.read() if question is None else question
        text.encode()
    except UnicodeError:
        raise UserError("the question is not valid UTF-8: change the encoding of the terminal or file") from None
    if not text.strip():
        raise UserError('there is no question: give one, as in python -m jobs.ask "How do I make good coffee?"')
    return text.strip() if question is None else text


def _typed() -> Iterator[str]:
    """Questions of their own, until the end of input."""
    while True:
        try:
            question = input("question> ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _weights(text: str) -> dict[str, float]:
    try:
        return parse_weights(text)
    except UserError as error:
        raise UserError(f"--weights: {error}") from None


def _preferences(texts: Sequence[str], weights: str | None) -> dict[str, float]:
    """text -> weight."""
    try:
        numbers = [1.0] * len(texts) if weights is None else [_number(part) for part in weights.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--prefer-weights: {error}; write 2,1") from None
    if len(numbers) != len(texts):
        raise UserError(f"--prefer-weights: {len(numbers)} given for {len(texts)} --prefer; give one for each")
    if len(set(texts)) < len(texts):
        raise UserError("--prefer: a text is given twice; give it once, with a larger weight")
    return dict(zip(texts, numbers, strict=True))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


# --- backends ---------------------------------------------------------------------------------------------------------


def open_backend(url: str | None, run: str | None, key: str = "") -> Backend:
    """A service, or a run's models in this process; by default the service of this machine, else the quickstart run.

    Raises UserError.
    """
    if url is not None:
        return service(url, key)
    if run is not None:
        return local(run)
    try:
        return service(URL, key)
    except UserError:
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

    return ask


def service(url: str, key: str = "") -> Backend:
    """A running service of this project, at its root or at /v1."""
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

    def model_of(response: httpx.Response) -> str:
        try:
            return str(json.loads(response.read())["model"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{url} is not a service of mavis_dist: give the address of one") from None

    model = call("GET", "/health", 2 * CONNECT_S, model_of)

    def ask(asked: Asked, write: Write) -> Report:
        def read(response: httpx.Response) -> Report:
            return _follow(events(response.iter_bytes()), write)

        return call("POST", "/v1/chat/completions", ANSWER_S, read, json=body(model, asked))

    return ask


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


if __name__ == "__main__":
    main()
