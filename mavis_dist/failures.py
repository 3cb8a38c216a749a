"""What exceptions of other processes end a stage with. Only text crosses where a process dies with its exception."""

from __future__ import annotations

import importlib
import re

from mavis_dist.types import StageError, UserError, one_line

OURS = ("mavis_dist.", "serve.")
RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.<>]*)(?:: (?P<message>.*))?$")  # a line of a traceback; <locals>
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
COLOURS = re.compile(r"\x1b\[[\d;]*m")
GUTTER = re.compile(r"^ *\| ?", re.MULTILINE)  # before the lines of an exception group


def failure_of(stage: str, error: BaseException, traceback: str = "") -> UserError:
    """An exception of another process as one line: the UserError that was raised there, or what was and where.

    Args:
        error: the exception, or one that holds it as `cause`.
        traceback: its traceback as text; left out: the one that Ray has added to `error`, or else the text of `error`,
            which then is the exception's only trace.
    """
    traceback = traceback or getattr(error, "traceback_str", "")
    cause, text = getattr(error, "cause", None) or error, traceback or str(error)
    if isinstance(cause, UserError):
        return cause
    if cause is error and not traceback:
        return user_error_in(text) or StageError(f"{stage}: {reason_in(text)}")
    return StageError(f"{stage}: {type(cause).__name__}: {one_line(cause, 300)}{_place(text)}")


def reason_in(text: str) -> str:
    """What the last traceback in a text ends with, and its place; without a traceback the start of the text."""
    if (refused := user_error_in(text)) is not None:
        return str(refused)
    if (end := _end(text)) is None:
        return one_line(COLOURS.sub("", text), 300)
    return one_line(f"{end['kind'].rpartition('.')[2]}: {end['message'] or ''}", 300) + _place(text)


def user_error_in(text: str) -> UserError | None:
    """The UserError that the last traceback in a text ends with; None: it ends with another exception, or has none."""
    end = _end(text)
    return UserError(end["message"]) if end and end["message"] and _is_user_error(end["kind"]) else None


def last_words(error: BaseException) -> str:
    """The last line of a message, where Ray says what went wrong."""
    lines = [line for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else error, 300)


def _end(text: str) -> re.Match[str] | None:
    """Kind and message of the exception that the last traceback ends with."""
    lines = GUTTER.sub("", COLOURS.sub("", text)).splitlines()
    frames = [number for number, line in enumerate(lines) if FRAME.search(line)]
    after = lines[frames[-1] + 1 :] if frames else []
    return next((found for line in after if not line.startswith(" ") and (found := RAISED.match(line))), None)


def _is_user_error(name: str) -> bool:
    """Whether a dotted name is that of a UserError of ours."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(OURS):
        return False
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, UserError)


def _place(text: str) -> str:
    """File and line of the innermost frame of a traceback."""
    frames = FRAME.findall(text)
    return f" ({'/'.join(frames[-1][0].split('/')[-2:])}:{frames[-1][1]})" if frames else ""
