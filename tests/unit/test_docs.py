"""The documentation names only what exists: config keys, links, anchors, files, commands, Python names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from mavis_dist.config import Config
from mavis_dist.sections import Objective
from tests.root import ROOT
from tests.unit.test_architecture import FLOORS

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("k8s/*.md"))]
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # a changelog also names what is gone
README_LINES = 150
FOLDERS = {"mavis_dist", "serve", "jobs", "benchmarks", "tests", "docs", "k8s", ".ci"}
PACKAGES = ("mavis_dist", "serve", "jobs")  # whose every file has a line in the tree of docs/architecture.md

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
COMMAND = re.compile(r"python -m (jobs|benchmarks)\.(\w+(?:\.\w+)?)([^`\n#]*)")
PATH = re.compile(r"\.?[\w-]+(/[\w.-]+)+/?")
SECTIONS = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
KEY = re.compile(rf"({'|'.join(SECTIONS)})(\.[a-z_]+)+")


class Named(NamedTuple):
    """Something that a page names, and where."""

    page: Path
    name: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.name}"


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


KEYS = set(known_keys(Config))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    return CODE.findall(prose(page))


def blocks(page: Path, language: str) -> list[str]:
    return [match["text"] for match in FENCE.finditer(page.read_text()) if match["language"] == language]


def is_file_of_ours(dotted: str) -> bool:
    """Whether a dotted name begins with a module: `serve.app.deploy` is no config key."""
    first, second, *_ = dotted.split(".")
    return (ROOT / first / f"{second}.py").is_file() or (ROOT / first / second).is_dir()


def mapping_keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a YAML mapping, down to those that the config knows as values."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, dict) and any(known.startswith(f"{key}.") for known in KEYS):
            yield from mapping_keys(value, f"{key}.")


def configs(page: Path) -> Iterator[dict[str, Any]]:
    """YAML on a page that is a config, or a part of one."""
    texts = blocks(page, "yaml") + [text for text in inline(page) if re.fullmatch(r"\w+: \{.*\}", text)]
    for node in map(yaml.safe_load, texts):
        if isinstance(node, dict) and node.keys() & (SECTIONS.keys() | {"objectives"}):
            yield node


def named_keys() -> Iterator[Named]:
    for page in PRESENT:
        for text in inline(page):
            key = re.split("[=:]", text)[0]
            if KEY.fullmatch(key) and not is_file_of_ours(text):
                yield Named(page, key)
        for command in COMMAND.finditer(page.read_text()):
            if command[0].split()[2] == "jobs.scale":  # its arguments are names of deployments
                continue
            overrides = re.sub(r"--\S+ \S+", "", command[3])  # an option's value may have an = as well
            yield from (Named(page, key) for key in re.findall(r"(?<=\s)([a-z_.]+)=\S", overrides))
        for node in configs(page):
            yield from (Named(page, key) for key in mapping_keys(node))


def links() -> Iterator[Named]:
    for page in PAGES:
        yield from (Named(page, target) for target in LINK.findall(prose(page)) if "://" not in target)


def anchors(page: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    headings = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths() -> Iterator[Named]:
    for page in PRESENT:
        for text in inline(page):
            if PATH.fullmatch(text) and text.split("/")[0] in FOLDERS and not re.search(r"\b[A-Z]{2,}\b/", text):
                yield Named(page, text)


def named_commands() -> Iterator[Named]:
    for page in PRESENT:
        yield from (Named(page, f"{match[1]}.{match[2]}") for match in COMMAND.finditer(page.read_text()))


def named_targets() -> Iterator[Named]:
    """Of make."""
    for page in PRESENT:
        lines = inline(page) + re.findall(r"^    (make .*)$", page.read_text(), re.MULTILINE)
        for text in lines:
            if text.startswith("make "):
                words = text.partition("#")[0].split()[1:]
                yield from (Named(page, word) for word in words if "=" not in word)


def imported_names() -> Iterator[Named]:
    """Of our packages, in Python blocks."""
    for page in PRESENT:
        for node in (node for text in blocks(page, "python") for node in ast.walk(ast.parse(text))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOLDERS:
                yield from (Named(page, f"{node.module}:{alias.name}") for alias in node.names)


def defines(module: str, name: str) -> bool:
    path = ROOT / module.replace(".", "/")
    if (path / f"{name}.py").is_file() or (path / name / "__init__.py").is_file():
        return True
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text()).body
    names = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {ast.unparse(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}
    # A package may load its names when they are first asked for.
    return name in names or f'"{name}"' in file.read_text()


def tree_files() -> set[str]:
    """The files and folders in the tree of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Files")[2]
    (tree,) = (match["text"] for match in FENCE.finditer(text))
    found, folders = set(), [""]
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth + 1 :] = [f"{folders[depth]}{name}"] if name.endswith("/") else []
        found.add(f"{folders[depth]}{name}")
    return found


@pytest.mark.parametrize("named", sorted(set(named_keys())), ids=str)
def test_config_keys_exist(named: Named) -> None:
    assert named.name in KEYS


def test_every_setting_of_the_service_is_described() -> None:
    described = set(inline(ROOT / "docs" / "serving.md"))
    assert {key for key in KEYS if key.startswith("serve.")} - described == set()


def test_objectives_in_configs_are_valid() -> None:
    found = [node["objectives"] for page in PRESENT for node in configs(page) if "objectives" in node]
    assert found
    for objectives in found:
        TypeAdapter(dict[str, Objective]).validate_python(objectives)


@pytest.mark.parametrize("named", sorted(set(links())), ids=str)
def test_links_resolve(named: Named) -> None:
    path, _, anchor = named.name.partition("#")
    target = (named.page.parent / path).resolve() if path else named.page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize("named", sorted(set(named_paths())), ids=str)
def test_paths_exist(named: Named) -> None:
    assert (ROOT / named.name).exists()


@pytest.mark.parametrize("named", sorted(set(named_commands())), ids=str)
def test_commands_exist(named: Named) -> None:
    path = named.name.replace(".", "/")
    assert (ROOT / f"{path}.py").is_file() or (ROOT / path / "__main__.py").is_file()


@pytest.mark.parametrize("named", sorted(set(named_targets())), ids=str)
def test_make_targets_exist(named: Named) -> None:
    assert re.search(rf"^{re.escape(named.name)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("named", sorted(set(imported_names())), ids=str)
def test_imported_names_exist(named: Named) -> None:
    assert defines(*named.name.split(":"))


def test_the_file_tree_is_the_tree() -> None:
    listed = tree_files()
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    ours = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in ours if not name.endswith("__init__.py")} - listed == set()


def test_the_table_of_rooms_has_the_floors() -> None:
    rooms = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n\n`jobs/`")[0]
    rows = [row.split("|")[1] for row in rooms.splitlines() if row.startswith("| `")]
    assert [set(re.findall(r"`(\w+)/?`", row)) for row in rows] == FLOORS


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
