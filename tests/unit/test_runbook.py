"""The runbook in docs/serving.md quotes the error codes and messages of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.root import ROOT

RUNBOOK = (ROOT / "docs" / "serving.md").read_text().partition("## Runbook")[2]
SERVICE = [ast.parse(file.read_text()) for file in sorted(ROOT.glob("serve/**/*.py"))]
STORE = [ast.parse((ROOT / "mavis_dist" / "store" / name).read_text()) for name in ("files.py", "values.py")]
OTHERS = [ast.parse(file.read_text()) for room in ("decode", "models") for file in ROOT.glob(f"mavis_dist/{room}/*.py")]
PLAN = ast.parse((ROOT / "mavis_dist" / "plan.py").read_text())
[CHECK_SERVING] = [node for node in PLAN.body if isinstance(node, ast.FunctionDef) and node.name == "check_serving"]
FOR_OPERATORS = {"DamagedFile", "DeployError", "EngineStopped", "KeyFileError", "PlanError", "StoreError"}


def constant_words(text: str) -> str:
    """A message with {} for its variable parts, quoted or not."""
    return re.sub(r"'?(\{[^{}]*\}|%[sdr])'?", "{}", text)


def template(node: ast.expr) -> str | None:
    """The message of an expression, if it is a literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return constant_words(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return constant_words("".join(parts))
    return None


def column(name: str) -> list[str]:
    """All text in backticks in columns of this name."""
    found, place = [], None
    for line in RUNBOOK.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 1:
            place = None
        elif place is None:
            place = cells.index(name) if name in cells else -1
        elif place > 0:
            found += re.findall(r"`([^`]+)`", cells[place])
    return found


def codes() -> Iterator[str]:
    """Every `code` of an error that the service answers with."""
    for node in (node for tree in SERVICE for node in ast.walk(tree)):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call):
            values += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            values += node.args[3:4] if getattr(node.func, "id", "") == "ApiError" else []
        if isinstance(node, ast.Assign) and any("code" in ast.unparse(target) for target in node.targets):
            values.append(node.value)
        constants = (part.value for value in values for part in ast.walk(value) if isinstance(part, ast.Constant))
        yield from (text for text in constants if isinstance(text, str) and re.fullmatch("[a-z]+(_[a-z]+)*", text))


def raised() -> Iterator[str]:
    """Every literal message of an error for operators."""
    for node in (node for tree in (*SERVICE, *STORE, CHECK_SERVING) for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in FOR_OPERATORS:
            message = template(node.args[0])
            if message is not None:
                yield message


TEMPLATES = {
    message
    for tree in (*SERVICE, *STORE, *OTHERS, CHECK_SERVING)
    for node in ast.walk(tree)
    if isinstance(node, ast.expr) and (message := template(node))
}
QUOTED = [constant_words(message) for message in column("message")]


def test_the_runbook_has_every_code_and_no_other():
    assert set(column("code")) == set(codes()) - {"prompt", "max_tokens"}
    assert "overloaded" in codes()


@pytest.mark.parametrize("message", QUOTED)
def test_every_quoted_message_is_in_the_code(message):
    assert any(message in text for text in TEMPLATES)


@pytest.mark.parametrize("message", sorted(set(raised())))
def test_every_error_for_operators_is_in_the_runbook(message):
    assert any(quoted in message for quoted in QUOTED)
