"""Programs that decode the same prompts, each in a process that is stopped while another one is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from benchmarks.common import peers
from mavis_dist.types import UserError

LOG_CHARACTERS = 2000


@dataclass(frozen=True)
class Program:
    """How to start a contender."""

    module: str  # runs `lines.serve`
    options: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)  # environment variables
    python: Path = Path(sys.executable)


class Contender:
    """A running program."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]):
        self._name, self._process, self._log = name, process, log
        started = self._answer()
        self.variants: list[str] = started["variants"]
        self.version: str = started["version"]
        self._signal(signal.SIGSTOP)

    def tokens_per_s(self, variant: str, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> float:
        """The speed at which it answers all prompts with so many tokens each; raises UserError if it has ended."""
        self._signal(signal.SIGCONT)
        self._ask({"variant": variant, "prompts": prompts, "tokens": tokens, "seed": seed})
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        assert answer["tokens"] == tokens * len(prompts), f"{variant} generated {answer['tokens']} tokens"
        return float(answer["tokens"] / answer["seconds"])

    def _ask(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended, and the answer says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            with suppress(subprocess.TimeoutExpired):  # its last words may come after the end of its answers
                self._process.wait(5)
            self._log.seek(0)
            raise UserError(f"the process of {self._name} has ended: {self._log.read()[-LOG_CHARACTERS:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended, and the answer says why
            os.killpg(self._process.pid, number)


@contextmanager
def start(programs: Mapping[str, Program]) -> Iterator[list[Contender]]:
    """All of them, started one after the other and stopped."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="mavis-")))
        contenders = []
        for name, program in programs.items():
            command: list[str | Path] = [
                program.python,
                "-m",
                program.module,
                json.dumps(program.options),
            ]
            log = stack.enter_context((folder / name).open("w+"))
            process = stack.enter_context(peers.running(command, program.settings, log, **pipes))
            contenders.append(Contender(name, process, log))
        yield contenders
