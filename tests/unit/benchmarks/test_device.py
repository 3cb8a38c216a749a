"""The benchmark of a GPU, on a processor with a tiny model: it needs few packages, and variants do the same work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import figures
from benchmarks.device import __main__ as device
from benchmarks.device import decoding, models, training
from benchmarks.device.machine import Machine
from benchmarks.device.models import ENTROPY, EOS, SHAPES
from benchmarks.device.page import render
from mavis_dist.core.tree import depth_weights
from mavis_dist.train import fit
from mavis_dist.train.data import TreeSet
from tests.root import ROOT

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
TREES = training.make_trees(TINY.vocabulary, 12)
MISSING = ("ray", "deepspeed", "pydantic", "typer", "scipy", "moocore")  # on a bare machine with a GPU


def test_it_measures_where_few_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, page = tmp_path / "device.json", tmp_path / "benchmarks.md"
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({MISSING}))\n"  # importing them raises ModuleNotFoundError
        "from benchmarks.device import training\n"
        "from benchmarks.device.__main__ import main\n"
        "training.NUM_TREES = 2\n"
        f"main(['--shapes', 'tiny', '--rows', '1,3', '--tokens', '8', '--json', {str(file)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny, 3 rows, lazy_2: " in done.stdout
    assert "tiny, training, packed: " in done.stdout
    found = figures.read(file)
    for rows in ("1", "3"):
        figure = found["shapes"]["tiny"]["rows"][rows]
        assert figure["tokens_per_s"].keys() == {"unguided", "lazy_2", "lazy_2_heads", "hf"}
        assert figure["step_ms"].keys() == figure["tokens_per_s"].keys() - {"hf"}
        assert 1 <= figure["candidates"]["lazy_2"] <= 40
        assert found[f"engine_vs_hf_b{rows}"]["tiny"] > 0
        assert found[f"roofline_fraction_b{rows}"]["tiny"] == figure["limit_ms"] / figure["step_ms"]["unguided"]
    assert found["training"]["computed_per_token"]["branches"] > found["training"]["computed_per_token"]["packed"]
    monkeypatch.setattr(device, "PAGE", page)
    device.main(["--page-only", "--json", str(file)])
    assert "| tiny, **this engine**, unguided | " in page.read_text()


def test_a_run_that_was_cut_off_has_a_page() -> None:
    speed = {"unguided": 4.0, "lazy_2": 2.0, "lazy_2_heads": 3.0, "hf": 1.0}
    figure = {
        "tokens_per_s": speed,
        "step_ms": speed,
        "candidates": speed,
        "nats": speed,
        "peak_gib": speed,
        "limit_ms": 2.0,
        "entropy": 1.5,
    }
    found = {
        "conditions": {"rows": [1, 16], "tokens": 128, "prompt_tokens": [90, 110]},
        "read_gb_per_s": 3000.0,
        "matmul_tflops": 700.0,
        "shapes": {"1b": {"rows": {"1": figure}}},
    }
    page = render({**device.headlines(found), **found, **figures.provenance("python -m benchmarks.device")})
    assert "| 1b, Hugging Face `generate` | 1 |  |" in page
    assert "| `engine_vs_hf_b1` | 4.00 |" in page
    assert "| `roofline_fraction_b1` | 0.50 |" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--shapes: 1b needs a GPU, and torch finds none; --shapes tiny runs without one"),
        (["--shapes", "2b"], "--shapes: there is no shape '2b'; use some of 1b, 7b, tiny"),
        (["--shapes", "tiny", "--rows", "0"], "--rows: 0 given; use integers >= 1"),
        (["--shapes", "tiny", "--tokens", "7"], "--tokens: 7 given; use an integer >= 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        device.main([*options, "--json", str(tmp_path / "device.json")])
    assert (end.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_models_are_as_peaked_as_asked_and_never_end() -> None:
    base = models.load(TINY, CPU).base
    prompts_BT = torch.randint(3, TINY.vocabulary, (16, 32))
    tokens_BT = models.sample(base.model, prompts_BT, torch.ones_like(prompts_BT), 32)
    found = models.entropy(models.top_logits(base.model, tokens_BT, 32))
    assert found == pytest.approx(ENTROPY, abs=0.8), "answers of a tiny model differ much"
    logits_BTV = base.model(input_ids=tokens_BT).logits
    assert not (logits_BTV.topk(models.TOP_K).indices == EOS).any()


def test_a_tied_model_does_not_repeat_what_it_reads() -> None:
    base = models.load(TINY, CPU).base
    tokens_BT = torch.randint(3, TINY.vocabulary, (8, 32))
    assert (base.model(input_ids=tokens_BT).logits.argmax(-1) == tokens_BT).float().mean() < 0.3


def test_sizes_are_those_of_the_models() -> None:
    model = models.load(TINY, CPU).base.model
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert TINY.num_weights == sum(part.in_features * part.out_features for part in linear)
    assert TINY.num_parameters == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert {name: round(shape.num_parameters / 1e8) for name, shape in SHAPES.items()} == {
        "1b": 12,
        "7b": 72,
        "tiny": 0,
    }


def test_the_least_time_of_a_step_grows_with_rows_and_tokens() -> None:
    one_byte_each_second = Machine(1000.0, float("inf"))
    assert one_byte_each_second.limit_ms(TINY, 3, 5.0) == 2 * TINY.num_weights + 15 * TINY.token_bytes
    assert Machine(float("inf"), 1000.0).limit_ms(TINY, 3, 5.0) == 6 * TINY.num_weights


def test_steps_are_timed_while_all_rows_generate() -> None:
    loaded, prompts = models.load(TINY, CPU), decoding.make_prompts(3, TINY.vocabulary)
    engine = decoding.Engine(loaded.base, max_rows=3, prefill_tokens=sum(map(len, prompts)))
    choices, seconds, step_s = decoding.generate(engine, decoding.make_requests(prompts, (), 8), CPU)
    assert [len(choice.tokens) for choice in choices] == [8, 8, 8]
    assert len(step_s) == 7, "without the first, which encodes the prompts"
    assert sum(step_s) < seconds


def test_variants_of_training_have_the_same_loss() -> None:
    """Packed, split and branch by branch, and that of the project."""
    model = models.value_model(TINY, CPU, torch.float32)
    work = [pack(TREES) for pack in (training.packed, training.packed_split, training.branch_by_branch)]
    losses = [float(training.squared_error(model, each)) for each in work]
    found = [each for _, each in TREES]
    trees = TreeSet([tree for tree, _ in TREES], found, depth_weights(found, training.LAYERS))
    losses.append(float(fit.squared_error(model, trees, list(range(len(trees))), "cpu")))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    num_targets = sum(len(each.index_X) for each in found)
    assert [sum(int((batch.weight_BX > 0).sum()) for batch in each.batches) for each in work] == [num_targets] * 3
