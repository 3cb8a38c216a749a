"""Every architecture that transformers builds tiny, through rollouts, a fit and guided decoding: `make test-models`."""

from __future__ import annotations

import pytest

from benchmarks.common import figures
from benchmarks.models.architectures import NAMES
from benchmarks.models.measure import RIGHT, measure

RECORDED = figures.read(figures.default_file("models"))["architectures"]


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_right_or_refused_as_the_page_says(name: str) -> None:
    if name not in RECORDED:
        pytest.skip("transformers has learnt it since docs/models.md was written")
    found = measure(name)
    assert found["outcome"] == RECORDED[name]["outcome"], found
    if found["outcome"] == RIGHT:
        assert found["packed"] < 1e-4
        assert found["decoded"] < 1e-4
        assert (found["states"] or 0.0) < 1e-4
        assert found["guided"]
        assert found["fitted"]
    else:
        assert found["reason"]
