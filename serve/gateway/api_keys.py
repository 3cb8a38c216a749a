"""API keys: a JSON file of names and SHA-256 hashes. Knows nothing of Ray or HTTP.

A key has 256 random bits, so its hash reveals nothing and needs no salt. It is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from pathlib import Path

from mavis_dist.store.files import write_whole
from mavis_dist.types import UserError

logger = logging.getLogger(__name__)

PREFIX = "mavis-"  # lets people and secret scanners recognise a leaked key
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
HASH = re.compile(r"[0-9a-f]{64}")


class KeyFileError(UserError):
    """A key file that cannot be used; the message names it and says what to do."""


class Keys:
    """The keys in a file, which is read again when it changes: adding and removing keys needs no restart."""

    def __init__(self, path: Path, fresh_s: float = 1.0):
        """Changes are seen after `fresh_s` seconds. Raises KeyFileError."""
        self._path, self._fresh_s = path, fresh_s
        self._stamp, self._hashes = _stamp(path), read(path)
        self._looked_at = time.monotonic()

    def owner(self, key: str) -> str | None:
        """The name of a key; None if it is unknown."""
        self._refresh()
        hashed = _hash(key)
        # Every hash is compared, each in constant time: the duration reveals nothing about any key.
        names = [name for name, known in self._hashes.items() if hmac.compare_digest(known, hashed)]
        return names[0] if names else None

    def _refresh(self) -> None:
        if time.monotonic() - self._looked_at < self._fresh_s:
            return
        self._looked_at = time.monotonic()
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._hashes, self._stamp = read(self._path), stamp
        except KeyFileError as error:
            logger.error("the keys known so far stay in force: %s", error)


def read(path: Path) -> dict[str, str]:
    """Name -> hash; raises KeyFileError."""
    try:
        hashes = json.loads(path.read_text())
        if all(NAME.fullmatch(name) and HASH.fullmatch(known) for name, known in hashes.items()):
            return hashes
        problem = "it is not an object of names and SHA-256 hashes"
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise KeyFileError(f"the key file {path} cannot be read ({problem}): restore it, or make a new one")


def add(path: Path, name: str) -> str:
    """Make a key, and store its hash under `name`; the file is made if it is missing. Raises KeyFileError."""
    if not NAME.fullmatch(name):
        raise KeyFileError(
            f"the name {name!r} is not 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    hashes = read(path) if path.exists() else {}
    if name in hashes:
        raise KeyFileError(f"{path} has a key of {name!r} already: remove it first, or choose another name")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(path, {**hashes, name: _hash(key)})
    return key


def remove(path: Path, name: str) -> None:
    """Remove a key; raises KeyFileError."""
    hashes = read(path)
    if name not in hashes:
        raise KeyFileError(f"{path} has no key of {name!r}; it has: {', '.join(sorted(hashes)) or 'none'}")
    del hashes[name]
    _write(path, hashes)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when the file does."""
    try:
        status = path.stat()
    except OSError:
        raise _missing(path) from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _missing(path: Path) -> KeyFileError:
    return KeyFileError(f"there is no key file {path}: make a key with `python -m jobs.keys add NAME --file {path}`")


def _write(path: Path, hashes: dict[str, str]) -> None:
    """The file appears whole, readable by its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(hashes, indent=1).encode(), mode=0o600)
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be written ({error}): choose another --file") from None
