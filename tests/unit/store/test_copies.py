"""Local copies of remote folders: made once, and gone when their process is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mavis_dist.store.copies import PREFIX
from mavis_dist.store.files import Store
from tests.root import ROOT
from tests.s3 import S3Server

MAKE = """
import os, signal, sys
from pathlib import Path
from mavis_dist.store.copies import local_copy
copy = local_copy("a", lambda target: (target / "f").write_text("1"))
print(copy, flush=True)
sys.stdin.read()
"""


def folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


def start(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a copy below a folder of temporary files."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", MAKE], cwd=ROOT, env=environment, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()


def test_copies_end_with_their_process_or_with_the_next_one(tmp_path: Path) -> None:
    killed, left = start(tmp_path)
    killed.kill()
    end(killed)
    assert (left / "f").read_text() == "1"
    living, other = start(tmp_path)
    assert (left / "f").exists()  # too new to tell from one that has just begun
    for folder in folders(tmp_path):
        os.utime(folder, (0, 0))
    third, _ = start(tmp_path)
    assert not left.exists()
    assert (other / "f").exists()
    end(third)
    end(living)
    assert folders(tmp_path) == []


def test_a_finished_folder_is_fetched_once_and_again_if_it_was_written_anew(s3: S3Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3.bucket}/{tmp_path.name}", "run")
    store.write_bytes("stage/f", b"1")
    assert store.download("stage") != store.download("stage")  # unfinished: others may still write
    store.finish("stage", {})
    first = store.download("stage")
    asked: list[str] = []
    s3.fault = lambda request: asked.append(request["PATH_INFO"])
    assert store.download("stage") == first
    assert asked
    assert not [path for path in asked if path.endswith("stage/f")]  # its marker alone
    store.write_bytes("stage/f", b"2")
    store.finish("stage", {"again": True})
    again = store.download("stage")
    assert ((first / "f").read_bytes(), (again / "f").read_bytes()) == (b"1", b"2")
