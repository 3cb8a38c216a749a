"""Estimated rates against measured ones."""

from __future__ import annotations

import json

import pytest

from mavis_dist.sizing.machines import CORE, GPUS, parse_machines
from mavis_dist.sizing.memory import Models
from mavis_dist.sizing.rates import Rates, guide_s, step_s, train_step_s
from mavis_dist.sizing.sizes import Size
from mavis_dist.sizing.workload import Training
from tests.root import ROOT
from tests.unit.sizing.shapes import SIZE_7B, run_config

FIGURES = ROOT / "docs/figures"
DEVICE = json.loads((FIGURES / "device.json").read_text())
H100 = GPUS["H100"]
# The shapes of benchmarks/device/models.py.
MATRICES_1B, MATRICES_7B = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192), 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
SHAPES = {
    "1b": Size(16, 2048, 8192, 128256, 128256 * 2048, 0, MATRICES_1B, 0, 8, 512, is_tied=True),
    "7b": Size(32, 4096, 14336, 32000, 32000 * 4096, 32000 * 4096, MATRICES_7B, 0, 8, 1024),
}
VISIBLE = 100 + 128 / 2


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_a_step_on_an_h100_takes_what_was_measured(shape: str, rows: int) -> None:
    estimate = 1000 * step_s(H100, SHAPES[shape], rows, VISIBLE, width=2)
    measured = DEVICE["shapes"][shape]["rows"][str(rows)]["step_ms"]["unguided"]
    assert estimate == pytest.approx(measured, rel=0.4 if (shape, rows) == ("1b", 256) else 0.2)


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_value_models_take_what_was_measured_within_a_factor(shape: str, rows: int) -> None:
    figures = DEVICE["shapes"][shape]["rows"][str(rows)]
    measured = figures["step_ms"]["lazy_2"] - figures["step_ms"]["unguided"]
    value = SHAPES[shape].backbone(4)
    estimate = 1000 * 2 * guide_s(H100, value, rows, figures["candidates"]["lazy_2"], width=2)
    assert 1 / 2.5 < estimate / measured < 2.5


@pytest.mark.parametrize("rows", [1, 4, 16, 32])
def test_a_step_on_two_cores_takes_what_was_measured(rows: int) -> None:
    """SmolLM2-135M: 30 layers of 3.5 million parameters, and an embedding that is the output."""
    smol = Size(30, 576, 1536, 49152, 28_311_552, 0, 3_538_944, 35_136, 3, 192, is_tied=True)
    two = parse_machines("1x2cpu")
    figures = json.loads((FIGURES / "decode.json").read_text())["tokens_per_s"]["64"]["unguided"][str(rows)]
    chip = H100.__class__("cores", 0, 2 * CORE.tflops, 2 * CORE.gb_per_s, 1, 1, CORE.train_fraction, 0)
    assert two.cpus == 2
    assert rows / step_s(chip, smol, rows, 64, width=2) == pytest.approx(sum(figures) / len(figures), rel=0.25)


def test_a_training_step_takes_what_was_measured() -> None:
    measured, base = DEVICE["training"], SHAPES["1b"]
    config = run_config(base={"device": "cuda"}, train={"gpus_per_worker": 1, "dtype": "bfloat16"})
    tokens = measured["tokens"]
    estimate = train_step_s(
        config, Models(base, base.backbone(4)), parse_machines("1x1xH100"), Rates(), Training("train", 1, 1, tokens)
    )
    assert tokens / estimate == pytest.approx(measured["tokens_per_s"]["packed"], rel=0.2)


def test_a_group_computes_faster_and_exchanges() -> None:
    alone, shared = (step_s(H100, SIZE_7B, 16, 200, 2, size) for size in (1, 4))
    assert alone / 4 < shared < alone


def test_what_is_measured_replaces_the_estimate() -> None:
    assert train_step_s(run_config(), None, parse_machines("1x2cpu"), Rates(step_s=3), Training("t", 1, 1, 1)) == 3
