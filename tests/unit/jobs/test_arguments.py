"""How jobs end where they cannot run."""

from __future__ import annotations

import pytest

from jobs import arguments


def missing(module: str) -> None:
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize("module", ["deepspeed", "peft.utils", "scipy", "matplotlib.figure", "vaderSentiment"])
def test_a_package_of_an_extra_that_is_missing_names_the_extra(module, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.refusing(lambda: missing(module))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {module} is not installed: training needs more, pip install 'mavis-dist[train]'\n"
    )


@pytest.mark.parametrize("module", ["torch", "ray.serve", "mavis_dist.nothing", "mine"])
def test_any_other_missing_module_is_a_fault_to_be_seen(module):
    with pytest.raises(ModuleNotFoundError):
        arguments.refusing(lambda: missing(module))
