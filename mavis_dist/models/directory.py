"""One Hugging Face directory: strict reading, errors that name the damaged file, fingerprints of the content.

Does not depend on where the directory came from.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mavis_dist.types import UserError, one_line

# Written last into a directory that this project built; holds the expected fingerprint of its content.
SEAL = "fingerprint.txt"
HASH_THREADS = 4
# Config keys that do not affect what the model computes.
VOLATILE_KEYS = frozenset({"transformers_version", "use_cache", "dtype", "torch_dtype"})

# Options of models without weights: the default way through experts has rules for a GPU's types alone.
WITHOUT_WEIGHTS = {"experts_implementation": "batched_mm"}


class ModelError(UserError):
    """A model that cannot be used; the message is one sentence for the user."""


def check_directory(directory: Path) -> Path:
    """Returns `directory` if its config is readable and every weight file is intact; raises ModelError."""
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if name == "config.json" or (directory / name).exists():
            _read_json(directory / name)
    for file in weight_files(directory):
        _check_weights(file)
    return directory


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, as its index lists them; raises ModelError if one is missing."""
    index = directory / "model.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise ModelError(f"model file {str(file)!r} is missing: give a directory that save_pretrained has written")
    return files


def read_model(
    auto: Any,
    directory: Path,
    dtype: str = "float32",
    optional: tuple[str, ...] = (),
    config: Any = None,
    num_shards: int = 1,
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """The model of an Auto class, in eval mode and without gradients; `config` replaces its own.

    Of several shards, one for each process of torch's process group, only this process's is read. `renamed`: regular
    expressions in the names of the weights, and what stands there in the model's.

    Missing weights are an error, because transformers would initialise them at random; only those whose names start
    with one of `optional` may be missing. Raises ModelError.
    """
    check_directory(directory)
    sharding = {}
    if num_shards > 1:
        from transformers.distributed import DistributedConfig

        sharding["distributed_config"] = DistributedConfig(tp_size=num_shards)
    with loading(directory), quiet():
        model, info = auto.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=None if renamed is None else dict(renamed),
            **sharding,
        )
    if missing := missing_weights(info, optional):
        raise ModelError(
            f"model directory {str(directory)!r} lacks the weights {', '.join(missing[:3])} that "
            f"{type(model).__name__} needs: choose a model of that class"
        )
    return model.eval().requires_grad_(False)


def missing_weights(info: Mapping[str, Any], optional: tuple[str, ...] = ()) -> list[str]:
    """Names of the weights that transformers' loading info says the files lack, but for those that begin so."""
    return sorted(key for key in info["missing_keys"] if not key.startswith(optional))


def read_config(directory: Path) -> Any:
    """The config of a model directory; code that it names is not run, nor asked about. Raises ModelError."""
    from transformers import AutoConfig

    _read_json(directory / "config.json")
    with loading(directory), quiet():
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory; raises ModelError."""
    from transformers import AutoTokenizer

    check_directory(directory)
    with loading(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def fingerprint_model(directory: Path) -> str:
    """SHA-256 (hex) of the architecture and of every tensor's name, type, shape and content.

    Independent of the path, the sharding and the files' metadata. Raises ModelError.
    """
    check_directory(directory)
    config = _read_json(directory / "config.json")
    essentials = {key: value for key, value in config.items() if key not in VOLATILE_KEYS and not key.startswith("_")}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        tensors = [line for file in weight_files(directory) for line in _tensor_lines(file, pool)]
    return _sha256("\n".join([json.dumps(essentials, sort_keys=True), *sorted(tensors)]))


def fingerprint_tokenizer(directory: Path) -> str:
    """SHA-256 (hex) of vocabulary, merges, text normalisation and special tokens; not of path or chat template.

    As the directory states them: what is changed after reading, such as marks of special tokens, has no effect. Raises
    ModelError.
    """
    tokenizer = read_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        # Files may hold the padding and truncation of the last call before they were saved.
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    rules["special"] = [str(tokenizer.bos_token), str(tokenizer.eos_token)]
    return _sha256(json.dumps(rules, sort_keys=True))


def check_seal(directory: Path, fingerprint: str) -> None:
    """Raises ModelError if this project built the directory and its content has changed since."""
    seal = directory / SEAL
    if seal.exists() and seal.read_text() != fingerprint:
        raise damaged(directory, "its content has changed since it was written")


def damaged(path: Path, reason: object) -> ModelError:
    """The error for an unreadable file or directory, with the remedy that fits its origin."""
    folder = path if path.is_dir() else path.parent
    prepared = (folder / SEAL).exists()
    remedy = f"remove the folder {str(folder)!r} to have it prepared again" if prepared else "put an intact copy there"
    return ModelError(f"model data in {str(path)!r} is damaged ({one_line(reason)}): {remedy}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of transformers, which every worker would print; errors are raised."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def loading(directory: Path) -> Iterator[None]:
    """Turns whatever transformers raises about a model directory into ModelError."""
    try:
        yield
    # Parsers of weights, configs and tokenizers raise any exception on damaged bytes, bare Exception included.
    except Exception as error:
        if (directory / SEAL).exists():
            raise damaged(directory, error) from error
        raise ModelError(
            f"model directory {str(directory)!r} cannot be loaded ({one_line(error)}): "
            f"give a complete model of a type that transformers supports"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model file {str(file)!r} is missing: give a complete Hugging Face directory") from None
    except ValueError as error:
        raise damaged(file, error) from None
    if not isinstance(content, dict):
        raise damaged(file, "it does not contain a JSON object")
    return content


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from None


def _tensor_lines(file: Path, pool: ThreadPoolExecutor) -> list[str]:
    """One line per tensor of a checked safetensors file: 8 bytes of header length, JSON header, then raw content."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        origin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:origin])
        header.pop("__metadata__", None)

        def line(name: str) -> str:
            start, end = (origin + offset for offset in header[name]["data_offsets"])
            with memoryview(data) as view:
                content = hashlib.sha256(view[start:end]).hexdigest()
            return f"{name} {header[name]['dtype']} {header[name]['shape']} {content}"

        return list(pool.map(line, header))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
