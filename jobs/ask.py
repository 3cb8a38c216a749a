"""Ask a question in the terminal, and compare the steered answer with the base model's.

    python -m jobs.ask "How do I make good coffee?" --weights positive=0.7,brief=0.3 [--compare]
    python -m jobs.ask "How do I make good coffee?" --prefer "Answer like a pirate." --run runs/quickstart

The answer comes from a running service (--url), or from the models of a finished run loaded in this process (--run).
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jobs import arguments, backends
from jobs.backends import RUN, URL, Asked, Backend, Report
from mavis_dist.types import UserError, parse_weights

INTERRUPTED, PIPE_CLOSED = 128 + 2, 128 + 13  # as a shell reports a process that SIGINT or SIGPIPE has ended


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
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest answer (default: that of the value models' training)"
    )
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
    backend = backends.choose(given.url, given.run, given.key or os.environ.get("MAVIS_API_KEY", ""))
    for name in weights:
        if name not in backend.objectives:
            raise UserError(f"--weights: there is no objective {name!r}; available: {', '.join(backend.objectives)}")
    trained = min(backend.objectives.values(), default=None)
    max_tokens = trained if given.max_tokens is None else given.max_tokens
    for question in questions:
        seed = secrets.randbelow(10**6) if given.seed is None else given.seed
        asked = Asked(question, seed, weights, preferences, given.beta, max_tokens, given.temperature, given.system)
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
        report = backend.ask(asked, _write)
        print(flush=True)
    print(summary(report, asked), file=sys.stdout if is_compared else sys.stderr)


def _print_block(head: str, backend: Backend, asked: Asked) -> Report:
    print(f"{head}\n{'-' * len(head)}", flush=True)
    report = backend.ask(asked, _write)
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


# --- the question ---------------------------------------------------------------------------------------------------


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
        weights = parse_weights(text)
    except UserError as error:
        raise UserError(f"--weights: {error}") from None
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"--weights: the weight of {name!r} is {weight:g}; use a number >= 0")
    return weights


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
    if not all(text.strip() for text in texts):
        raise UserError("--prefer: a text is empty; say what is preferred")
    if any(number < 0 for number in numbers) or (numbers and not any(numbers)):
        raise UserError(f"--prefer-weights: {weights} given; use numbers >= 0, one of them above 0")
    return dict(zip(texts, numbers, strict=True))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


if __name__ == "__main__":
    main()
