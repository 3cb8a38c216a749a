"""Progress on stderr: one line per message. Knows nothing of Ray."""

from __future__ import annotations

import sys
import time


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
