"""The rooms of the project and who may know whom; pinned by reading the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.root import ROOT

# A room may import from itself and from every room of a lower floor.
FLOORS = [
    {"types", "paths", "progress", "tables"},
    {"sections", "environment", "failures"},
    {"config"},
    {"plan", "prompts", "native"},
    {"core"},
    {"models", "store"},
    {"rewards", "sizing"},
    {"decode"},
    {"llm"},
    {"vllm"},
    {"cluster"},
    {"tasks", "actors", "groups"},
    {"rollout", "train", "evaluate"},
    {"preflight"},
    {"run_state"},
    {"pipeline"},
    {"compare"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
VLLM = {"vllm/processor.py", "vllm/interrupt.py"}
RAY = {"cluster.py", "tasks.py", "actors.py", "groups.py", "rollout/worker.py", "train/launch.py", "compare/worker.py"}
PROCESSES = {"gateway", "base", "value"}  # folders of serve/, one per process
SERVE_MAY_USE = {
    "environment",
    "sections",
    "models",
    "decode",
    "store",
    "config",
    "types",
    "plan",
    "cluster",
    "groups",
    "vllm",
    "core",
    "failures",
}
DEPLOYMENT_MAY_USE = SERVE_MAY_USE | {"preflight", "tasks"}  # serve/app.py runs in the driver


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, top_level: bool = False, with_members: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports; `with_members`: also of what it imports from them."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "mavis_dist" or with_members:
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
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
def test_ray_deepspeed_and_vllm_stay_in_their_places(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)}
    assert "vllm" not in tops or name(path) in VLLM
    assert "ray" not in tops or name(path) in RAY
    assert "deepspeed" not in tops or name(path) == "train/engine.py"
    assert "deepspeed" not in {module.split(".")[0] for module in imports(path, top_level=True)}


@pytest.mark.parametrize("path", files("mavis_dist/core"), ids=name)
def test_mathematics_knows_no_machinery(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"ray", "transformers", "pydantic", "deepspeed"}
    assert {room(module) for module in imports(path)} <= {None, "core"}


def place(path: Path, folder: str) -> str:
    """The folder below `folder` that a file lies in; empty for a file of its own."""
    parts = path.relative_to(ROOT / folder).parts
    return parts[0] if len(parts) > 1 else ""


def below(folder: str, modules: set[str]) -> set[str]:
    """The parts directly below a package that dotted names belong to."""
    return {module.split(".")[1] for module in modules if module.startswith(f"{folder}.")}


@pytest.mark.parametrize("path", files("serve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_processes_of_the_service_share_messages_only(path: Path) -> None:
    """Gateway, base replica and value replica never import one another; what they share does not know them."""
    if path.name == "app.py":  # composes all three
        return
    used = below("serve", imports(path)) & PROCESSES
    assert used <= {place(path, "serve")}


@pytest.mark.parametrize("path", files("benchmarks"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_benchmark_imports_what_is_common_only(path: Path) -> None:
    own = place(path, "benchmarks")
    assert own or path.name == "__init__.py", "every command has a folder"
    assert below("benchmarks", imports(path)) <= {own, "common"}


def test_no_imports_in_a_circle() -> None:
    modules = {dotted(path): path for path in files("mavis_dist", "serve", "jobs", "benchmarks")}
    graph = {module: imports(path, with_members=True) & modules.keys() - {module} for module, path in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", files("serve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_service_does_not_train(path: Path) -> None:
    used = {room(module) for module in imports(path)} - {None}
    assert used <= (DEPLOYMENT_MAY_USE if path.name == "app.py" else SERVE_MAY_USE)
    assert "serve" not in imports(path), "write `from ray import serve` and `from serve.x import y`"


@pytest.mark.parametrize(
    ("job", "shown"),
    [
        *(
            (job, ["rollout.max_tokens", "in tokens"])
            for job in ("check", "distill", "pipeline", "quickstart", "serve")
        ),
        ("evaluate", ["--json", "compare.methods"]),
        ("ask", ["--compare", "MAVIS_API_KEY"]),
        ("keys", ["create a key"]),
        ("plan", ["--machines", "rollout.max_tokens"]),
    ],
)
def test_help_is_instant_and_loads_no_framework(job: str, shown: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['{job}', '--help']\n"
        f"from jobs import {job} as job\n"
        "try:\n    job.main()\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'too much is loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in shown)


def run_script(*lines: str) -> None:
    """Run Python in the root of the checkout; fails with what it printed."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_package_loads_torch_only_when_it_is_used() -> None:
    run_script(
        "import sys, mavis_dist",
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), 'too much is loaded'",
        "assert {'LLM', 'Answer'} <= set(mavis_dist.__all__)",
    )


def test_the_python_door_never_loads_ray() -> None:
    modules = {dotted(path): path for path in files("mavis_dist")}
    reached, todo = set(), ["mavis_dist.llm"]
    while todo:
        module = todo.pop()
        if module not in reached and module in modules:
            reached.add(module)
            todo += imports(modules[module], with_members=True)
    assert "mavis_dist.decode.engine" in reached
    for module in reached:
        assert "ray" not in {used.split(".")[0] for used in imports(modules[module])}, module


@pytest.mark.parametrize("module", ["mavis_dist.cluster", "mavis_dist.actors", "serve.app", "serve.gateway.replica"])
def test_ray_never_loads_before_token_mode_is_set(module: str) -> None:
    run_script(
        "import os, sys",
        "os.environ.pop('RAY_AUTH_MODE', None)",
        "class Watch:",
        "    def find_spec(self, name, path=None, target=None):",
        "        if name == 'ray':",  # what happens after its import began does not matter
        "            os._exit(0 if os.environ.get('RAY_AUTH_MODE') == 'token' else 3)",
        "sys.meta_path.insert(0, Watch())",
        f"import {module}",
        "sys.exit('ray was never imported')",
    )


PATHS_OF_A_RUN = re.compile(  # those of the gate are spelt as its request ids are
    r"^(rollouts|labels|values|distilled|train|eval)/|^(run\.yaml|stages\.json|report\.html)$|published\.json"
)


@pytest.mark.parametrize("path", files("mavis_dist", "serve", "jobs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_layout_knows_where_things_lie_in_a_run(path: Path) -> None:
    if path == ROOT / "mavis_dist/store/layout.py":
        return
    tree = ast.parse(path.read_text())
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    templates = {name for node in ast.walk(tree) if isinstance(node, ast.Call) for name in package_files(node)}
    assert not [node.value for node in parts if PATHS_OF_A_RUN.search(node.value) and node.value not in templates]


def package_files(call: ast.Call) -> Iterator[str]:
    """Names of files beside the code, which `importlib.resources` and Jinja read."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("joinpath", "get_template"):
        yield from (arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
