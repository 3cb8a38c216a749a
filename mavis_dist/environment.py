"""All environment variables of this project; no other module sets any. Import it before ray.

One that is set but empty counts as not set, except MAVIS_KEYS.

RAY_AUTH_MODE=token                    Ray's ports unpickle what they receive: every connection needs a token
RAY_TRAIN_V2_ENABLED=1                 the version of Ray Train that this project is written for
RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5  how often Ray Train polls its workers; every report waits for a poll
RAY_USAGE_STATS_ENABLED=0              no usage statistics are sent
RAY_SERVE_PROXY_USE_GRPC=1             the proxy gets responses over gRPC: a chunk as a Ray object costs three times as
                                       much
RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0  the proxy reads them in its own event loop, without a second thread; for the
                                       replicas serve.app decides
RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0   CPU actors keep the GPU visibility of their machine
TOKENIZERS_PARALLELISM=false           threads of tokenizers do not survive a fork
OMP_WAIT_POLICY=PASSIVE                processes share cores: a thread that spins delays the one it waits for (steps
                                       were 10 times slower with two models on two cores)
GOMP_SPINCOUNT=1000                    but waking a thread costs as much as a small matrix product: a few microseconds
                                       of spinning save a fifth of a step
MAVIS_KEYS                             file of API keys that `jobs.serve` requires (default: no keys on loopback, else
                                       keys.json); "none": no keys on any address
MAVIS_API_KEY                          API key that `jobs.ask` sends to a service
MAVIS_VALUES                           value models that a vLLM server steers with: a run's folder or URI, or pairs
                                       name=folder (docs/vllm.md)
MAVIS_ANY_VLLM                         set: versions of vLLM that were not tested may be used
MAVIS_CACHE                            folder of prepared models and compiled operators (default ~/.cache/mavis_dist)
RAY_ADDRESS                            cluster to join; without it a local one is started
RAY_API_SERVER_ADDRESS                 Ray's dashboard, for jobs.submit and jobs.scale (default http://127.0.0.1:8265)
HOME                                   where it is no folder that this user may write to, as in many containers (/, none
                                       or another user's), the one in the list of users, else a private folder below
                                       the temporary files: libraries store settings and caches there
"""

from __future__ import annotations

import os
import platform
import pwd
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from mavis_dist.paths import absolute
from mavis_dist.types import UserError

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
for _name, _value in ENVIRONMENT.items():
    os.environ[_name] = os.environ.get(_name, "").strip() or _value  # without blanks: Ray takes " token " for no mode


def private_folder() -> str:
    """A folder of this user alone that stays the same, or a new one where somebody else has its name."""
    folder = Path(tempfile.gettempdir(), f"mavis-home-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return tempfile.mkdtemp(prefix="mavis-home-")
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return str(folder) if is_private else tempfile.mkdtemp(prefix="mavis-home-")


def home() -> str:
    """HOME, or the home folder in the list of users, or a private one: the first that this user may write to."""
    known = [os.environ.get("HOME", "").strip()]
    with suppress(KeyError):  # a user without an entry
        known.append(pwd.getpwuid(os.getuid()).pw_dir)
    return next(filter(_is_home, known), None) or private_folder()


def _is_home(folder: str) -> bool:
    # Containers set / for users without a home.
    return os.path.isabs(folder) and folder.strip("/") != "" and os.access(folder, os.R_OK | os.W_OK | os.X_OK)


os.environ["HOME"] = home()

FLAG = ("0", "1")
# What Ray and OpenMP understand. Ray takes any other mode of authentication for none, without a word.
ALLOWED = {
    "RAY_AUTH_MODE": ("token", "disabled"),
    "RAY_TRAIN_V2_ENABLED": ("1",),
    "RAY_USAGE_STATS_ENABLED": FLAG,
    "RAY_SERVE_PROXY_USE_GRPC": FLAG,
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": FLAG,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": FLAG,
    "OMP_WAIT_POLICY": ("passive", "active"),
}
DASHBOARD = "http://127.0.0.1:8265"  # where Ray puts it
COMPUTING = ("mavis-dist", "torch", "transformers")  # packages that decide what a model computes
FOLDERS = ("MAVIS_CACHE", "HF_HOME")  # that all processes of a run share


def variable(name: str) -> str | None:
    """An environment variable; None where it is not set or empty."""
    return os.environ.get(name, "").strip() or None


def check() -> None:
    """Raises UserError for a variable of this project that Ray would misread or ignore."""
    for name, allowed in ALLOWED.items():
        if (value := os.environ[name]).strip().lower() not in allowed:
            raise UserError(f"environment variable {name} is {value!r}: set it to {' or '.join(allowed)}, or unset it")
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    if not _is_positive(value := os.environ[name]):
        raise UserError(f"environment variable {name} is {value!r}: set it to a number of seconds, or unset it")


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def forwarded() -> dict[str, str]:
    """The variables that the processes of all machines get, with absolute folders: they have other working folders."""
    folders = {name: _folder(name) for name in FOLDERS if variable(name) is not None}
    return {name: os.environ[name] for name in ENVIRONMENT} | folders


def versions(packages: Iterable[str] = COMPUTING) -> dict[str, str]:
    """The versions of Python and of these packages in this process."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def dashboard() -> str:
    """The address of Ray's dashboard: RAY_API_SERVER_ADDRESS, or that of a cluster on this machine."""
    return variable("RAY_API_SERVER_ADDRESS") or DASHBOARD


def key_file() -> str | None:
    """MAVIS_KEYS; raises UserError if it is set but empty, since that may be meant to open or to close the service."""
    value = os.environ.get("MAVIS_KEYS")
    if value is not None and not value.strip():
        raise UserError(
            f"environment variable MAVIS_KEYS is {value!r}: set it to a file of API keys (python -m jobs.keys), or to "
            "none for a service without keys, or unset it"
        )
    return value


def cache_folder() -> Path:
    """What is prepared once per machine, or once for all machines that share the folder; raises UserError."""
    return Path(_folder("MAVIS_CACHE", "~/.cache/mavis_dist"))


def _folder(name: str, default: str = "") -> str:
    try:
        return absolute(variable(name) or default)
    except ValueError as error:
        raise UserError(f"environment variable {name} is {os.environ.get(name)!r}: {error}") from None
