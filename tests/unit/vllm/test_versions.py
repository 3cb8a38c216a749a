"""Which versions of vLLM are used. Without vLLM."""

from __future__ import annotations

from importlib import metadata

import pytest

from mavis_dist.config import load
from mavis_dist.preflight.machine import check_packages
from mavis_dist.types import UserError
from mavis_dist.vllm import versions
from tests.root import ROOT


def test_a_run_with_vllm_needs_it(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    config = load(ROOT / "jobs" / "configs" / "quickstart.yaml", ["base.engine=vllm"])
    with pytest.raises(UserError, match=r"base\.engine=vllm needs vLLM, which is not installed: pip install"):
        check_packages(config)


@pytest.mark.parametrize(("version", "is_fine"), [("0.32.0", True), ("0.31.1", False), ("1.0.0", False)])
def test_versions_that_were_not_tested_are_refused_unless_one_insists(monkeypatch, version, is_fine):
    def installed(package):
        if package == "vllm":
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(versions, "find_spec", lambda name: object())
    monkeypatch.setattr(versions.metadata, "version", installed)
    if not is_fine:
        with pytest.raises(UserError, match=rf"vLLM {version} was not tested with this mavis_dist: install 0\.32\.0"):
            versions.check_installed()
        monkeypatch.setenv(versions.ANY_VERSION, "1")
    versions.check_installed()
