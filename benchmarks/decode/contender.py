"""The programs whose decoding is compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import peers
from benchmarks.common.contender import Program
from benchmarks.decode import gguf_files
from mavis_dist.models.fetch import fetch

MODULES = "benchmarks.decode.contenders"


def programs(
    run: Path, base: str, options: Mapping[str, Any], pythons: Mapping[str, Path], folder: Path
) -> dict[str, Program]:
    """This project's engine, Hugging Face, and the peers that have an interpreter.

    `options` are those of all programs; model files are written to `folder`.
    """
    model, threads = fetch(base), options["threads"]
    openmp = {"OMP_NUM_THREADS": str(threads)}  # and the waiting that libgomp chooses for a program alone
    found = {
        "this engine": Program(f"{MODULES}.own_engine", {**options, "run": str(run.absolute())}),
        "hf": Program(f"{MODULES}.hugging_face", {**options, "model": str(model)}, openmp),
    }
    if peers.VLLM in pythons:
        for name, settings in peers.vllm_settings(threads).items():
            own = {**options, "model": str(model), "name": name}
            found[name] = Program(f"{MODULES}.vllm_offline", own, settings, pythons[peers.VLLM])
    if peers.LLAMACPP in pythons:
        kinds = {"llamacpp_bf16": gguf_files.BF16, "llamacpp_q8_0": gguf_files.Q8_0}
        files = {name: folder / f"{name}.gguf" for name in kinds}
        for name, file in files.items():
            gguf_files.write(model, file, kinds[name])
        own = {**options, "files": {name: str(file) for name, file in files.items()}}
        found["llamacpp"] = Program(f"{MODULES}.llama_batch", own, openmp, pythons[peers.LLAMACPP])
    return found
