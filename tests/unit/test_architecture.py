"""The rooms of the project and who may know whom; pinned by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room may import from itself and from every room of a lower floor.
FLOORS = [
    {"types", "environment"},
    {"sections"},
    {"config"},
    {"plan", "prompts"},
    {"core"},
    {"models", "store"},
    {"rewards"},
    {"decode"},
    {"cluster"},
    {"rollout", "train", "evaluate"},
    {"run"},
    {"pipeline"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
RAY = {"cluster.py", "rollout/worker.py", "train/parallel.py"}
SERVE_MAY_USE = {"environment", "sections", "models", "decode", "store", "config", "types", "plan", "cluster", "core"}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "mavis_dist":
                found.update(f"mavis_dist.{alias.name}" for alias in node.names)
    return found


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def room(module: str) -> str | None:
    """The room of a dotted name of ours; None for the package itself and for others' modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mavis_dist" and len(parts) > 1 else None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "mavis_dist"))


@pytest.mark.parametrize("path", files("mavis_dist"), ids=name)
def test_rooms_look_down_only(path: Path) -> None:
    if name(path) == "__init__.py":
        return
    own = Path(name(path)).parts[0].removesuffix(".py")
    for used in filter(None, map(room, imports(path))):
        assert used == own or FLOOR_OF[used] < FLOOR_OF[own], f"{name(path)} must not import {used}"


@pytest.mark.parametrize("path", files("mavis_dist"), ids=name)
def test_the_package_does_not_know_its_users(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & {"jobs", "serve"}


@pytest.mark.parametrize("path", files("mavis_dist"), ids=name)
def test_ray_and_deepspeed_stay_in_their_places(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)}
    assert "ray" not in tops or name(path) in RAY
    assert "deepspeed" not in tops or name(path) == "train/engine.py"
    assert "deepspeed" not in {module.split(".")[0] for module in imports(path, top_level=True)}


@pytest.mark.parametrize("path", files("mavis_dist/core"), ids=name)
def test_mathematics_knows_no_machinery(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"ray", "transformers", "pydantic", "deepspeed"}
    assert {room(module) for module in imports(path)} <= {None, "core"}


@pytest.mark.parametrize("path", files("serve"), ids=lambda path: path.name)
def test_the_service_does_not_train(path: Path) -> None:
    used = {room(module) for module in imports(path)} - {None}
    assert used <= SERVE_MAY_USE
    assert "serve" not in imports(path), "write `from ray import serve` and `from serve.x import y`"


def test_help_is_instant_and_loads_no_framework() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['pipeline', '--help']\n"
        "from jobs import pipeline\n"
        "try:\n    pipeline.main()\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'too much is loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rollout.max_tokens" in done.stdout
    assert "in tokens" in done.stdout


@pytest.mark.parametrize("module", ["mavis_dist.cluster", "serve.app", "serve.gateway"])
def test_ray_never_loads_before_token_mode_is_set(module: str) -> None:
    script = (
        "import os, sys\n"
        "os.environ.pop('RAY_AUTH_MODE', None)\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'ray' or os.environ.get('RAY_AUTH_MODE') == 'token', 'ray came first'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}\n"
        "assert 'ray' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
