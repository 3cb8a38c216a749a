"""Progress on stderr, one line per message. No Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable, Iterator
from typing import Protocol, TypeVar


class Countable(Protocol):
    """A result that progress counts."""

    @property
    def key(self) -> Hashable: ...  # the same for a result that arrives again

    @property
    def num_tokens(self) -> int: ...


Result = TypeVar("Result", bound=Countable)


def say(stage: str, text: str) -> None:
    """One line of progress."""
    print(f"{stage:<24} {text}", file=sys.stderr, flush=True)


class Meter:
    """Prints the progress of a stage: done/total, rate, time left."""

    def __init__(self, stage: str, unit: str, every_s: float = 5.0):
        self._stage, self._unit, self._every_s = stage, unit, every_s
        self._started = self._last = time.monotonic()

    def show(self, done: int, total: int, text: str = "", final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self._last < self._every_s:
            return
        self._last = now
        elapsed = now - self._started
        rate = done / elapsed if elapsed > 0 else 0.0
        time_left = f"{(total - done) / rate:.0f} s left" if rate > 0 and not final else f"{elapsed:.0f} s"
        say(self._stage, f"{done}/{total} {self._unit}, {rate:.2f}/s, {time_left}  {text}".rstrip())


def metered(results: Iterable[Result], stage: str, unit: str, total: int, with_speed: bool = False) -> Iterator[Result]:
    """The results, with lines of progress: how many of `total` have arrived, and tokens/s if `with_speed`."""
    meter, started, seen, num_tokens = Meter(stage, unit), time.monotonic(), set(), 0
    for result in results:
        yield result
        seen.add(result.key)
        num_tokens += result.num_tokens
        speed = f"{num_tokens / (time.monotonic() - started):.0f} tokens/s" if with_speed else ""
        meter.show(len(seen), total, speed, final=len(seen) == total)


class StallWarning:
    """Prints a line when nothing has finished for a while."""

    def __init__(self, stage: str, after_s: float = 60.0):
        self._stage, self._after_s = stage, after_s
        self._since = self._warned = time.monotonic()

    def check(self, is_progress: bool, explanation: str) -> None:
        now = time.monotonic()
        if is_progress:
            self._since = self._warned = now
        elif now - self._warned >= self._after_s:
            self._warned = now
            say(self._stage, f"nothing finished for {now - self._since:.0f} s: {explanation}")
