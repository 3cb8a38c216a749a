"""Compiles the operators, once per kind of processor, and loads them into torch.

The library lies beside the prepared models ($MAVIS_CACHE/native) under a name that holds what it depends on: the
instructions it uses, torch's version, and its source. Any machine that shares the folder thus finds its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout

from mavis_dist.environment import cache_folder
from mavis_dist.types import one_line

SOURCES = [Path(__file__).with_name(name) for name in ("forward.cpp", "largest.cpp")]
HEADER = Path(__file__).with_name("arithmetic.h")
# The instruction sets that torch's own kernels distinguish.
ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
TIMEOUT_S = 600  # of waiting for another process that compiles


class NativeError(RuntimeError):
    """The library cannot be had here; says why."""


@cache
def is_loaded() -> bool:
    """Whether the operators in `torch.ops.mavis` are there; loads them, after compiling them if nobody has yet.

    Says once per process why they are not.
    """
    try:
        torch.ops.load_library(library())
    except (NativeError, OSError) as error:
        print(
            f"models run without compiled operators, at about half the speed: {one_line(error, limit=500)}",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def has_compiler() -> bool:
    return shutil.which(_compiler()) is not None


def use_own_ninja() -> None:
    """Let torch find this environment's ninja, which is not in the PATH unless the environment is activated."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def library() -> Path:
    """The compiled library; raises NativeError."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ARCHITECTURES:
        raise NativeError(f"processors of type {capability} are not supported")
    flags = [f"-march={ARCHITECTURES[capability]}", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += ["-O3", "-std=c++20", "-fopenmp"]
    content = b"".join(source.read_bytes() for source in (HEADER, *SOURCES))
    key = hashlib.sha256(" ".join([torch.__version__, *flags]).encode() + content).hexdigest()
    target = cache_folder() / "native" / f"{capability.lower()}-{key[:16]}.so"
    if not target.exists():
        _compile_once(target, flags)
    return target


def _compile_once(target: Path, flags: list[str]) -> None:
    """Compile `target`; a failure is remembered, since trying takes half a minute."""
    if not has_compiler():
        raise NativeError(f"they have to be compiled, and there is no compiler {_compiler()!r}: install g++ (Debian)")
    failure = target.with_suffix(".failed")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=TIMEOUT_S):
            if failure.exists():
                raise NativeError(f"they could not be compiled (see {failure}, and delete this file to try again)")
            if not target.exists():
                _compile(target, flags, failure)
    except Timeout:
        raise NativeError(f"another process has been compiling them for more than {TIMEOUT_S} s") from None
    except OSError as error:
        raise NativeError(f"they cannot be stored in {target.parent} ({one_line(error, limit=500)})") from None


def _compile(target: Path, flags: list[str], failure: Path) -> None:
    from torch.utils import cpp_extension

    use_own_ninja()
    print("compiling the operators for models (about 30 s, once)", file=sys.stderr, flush=True)
    with TemporaryDirectory(dir=target.parent) as work:
        try:
            cpp_extension.load(
                "mavis_native",
                [str(source) for source in SOURCES],
                extra_cflags=flags,
                build_directory=work,
                is_python_module=False,
            )
        except Exception as error:  # torch raises what the step that fails raises
            failure.write_text(str(error))
            raise NativeError(f"they could not be compiled (see {failure})") from None
        (Path(work) / "mavis_native.so").rename(target)
