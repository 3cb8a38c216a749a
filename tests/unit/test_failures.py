"""An exception of another process ends a stage with one line: its own if it is a UserError, else what and where."""

from __future__ import annotations

import pickle
import traceback

import pytest

from mavis_dist.failures import failure_of, last_words, reason_in, user_error_in
from mavis_dist.models.directory import ModelError
from mavis_dist.types import StageError, UserError


def raised(error: Exception) -> str:
    """The traceback of an exception, as Ray prints it."""
    try:
        raise error
    except Exception:
        return f"\x1b[36mray::Worker.__init__()\x1b[39m (pid=1, ip=10.0.0.1)\n{traceback.format_exc()}"


class Remote(Exception):
    """What Ray raises for an exception of another process."""

    def __init__(self, cause: Exception):
        super().__init__(raised(cause))
        self.cause = cause


def test_a_user_error_keeps_its_own_line():
    error = ModelError("model 'x' does not exist: give one")
    assert failure_of("rollouts i0", Remote(error)) is error
    assert failure_of("rollouts i0", error) is error


def test_a_user_error_that_arrives_as_text_keeps_its_line():
    text = raised(ModelError("model 'x' does not exist: give one"))
    assert str(user_error_in(text)) == "model 'x' does not exist: give one"
    found = failure_of("rollouts i0", RuntimeError(text))
    assert isinstance(found, UserError)
    assert str(found) == "model 'x' does not exist: give one"


@pytest.mark.parametrize("error", [ValueError("no\nsuch  thing"), KeyError("no such thing"), AssertionError()])
def test_any_other_exception_is_a_line_with_its_place(error):
    found = failure_of("train i0 brief", Remote(error), raised(error))
    assert isinstance(found, StageError)
    assert str(found).startswith(f"train i0 brief: {type(error).__name__}: ")
    assert "unit/test_failures.py:" in str(found)
    assert "\n" not in str(found)


def test_the_last_exception_counts():
    text = raised(ModelError("first: mend it")) + "\nDuring handling of it\n\n" + raised(OSError("the disk is gone"))
    assert reason_in(text).startswith("OSError: the disk is gone (")
    assert user_error_in(text) is None


@pytest.mark.parametrize("text", ["", "waiting for room", "mine.errors.UserError: x", "mavis_dist.nothing.Error: x"])
def test_texts_without_a_user_error_of_ours(text):
    assert user_error_in(text) is None
    assert reason_in(text).strip() == (text or "str")


def test_an_exception_of_a_function_is_named():
    class Odd(Exception):
        pass

    assert reason_in(raised(Odd("no luck"))).startswith("Odd: no luck (unit/test_failures.py:")


GROUP = """\x1b[36mray::Worker.work()\x1b[39m (pid=1, ip=10.0.0.1)
  + Exception Group Traceback (most recent call last):
  |   File "/app/mine/job.py", line 7, in work
  |     raise ExceptionGroup("two", errors)
  | ExceptionGroup: two (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/app/mine/disk.py", line 9, in write
    |     raise OSError("the disk is gone")
    | OSError: the disk is gone
    +------------------------------------
"""


def test_a_group_of_exceptions_is_its_last_one():
    assert reason_in(GROUP) == "OSError: the disk is gone (mine/disk.py:9)"
    without_traceback = GROUP.replace('File "/app/mine/disk.py"', "disk").replace("Traceback", "no traceback")
    assert reason_in(without_traceback) == "ExceptionGroup: two (1 sub-exception) (mine/job.py:7)"


def test_a_line_has_no_colours():
    assert reason_in("\x1b[31mthe runtime environment\x1b[0m\ncannot be set up") == (
        "the runtime environment cannot be set up"
    )


def test_last_words():
    assert last_words(RuntimeError("Traceback\n  File x\nValueError: y\n\n")) == "ValueError: y"


def every_user_error(kind: type[UserError] = UserError) -> list[type[UserError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in every_user_error(below))]


def test_every_user_error_crosses_processes():
    import mavis_dist.compare.run  # noqa: F401  defines more of them
    from mavis_dist.decode import RequestError

    for kind in every_user_error():
        number = 2 if issubclass(kind, RequestError) else 1
        error = kind(*["text"] * number)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
