"""Object storage: every failure is one line, nothing is stale, and objects appear whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mavis_dist.store.files import MARKER, Store, StoreError
from mavis_dist.store.tree_folder import TreeFolder
from tests.s3 import RETRIES, Answer, S3Server, forget_connections, refusal

PART = 5 * 2**20  # bytes, the smallest that S3 allows; objects of two and more are uploaded in parts


@pytest.fixture
def store(s3: S3Server, tmp_path: Path) -> Store:
    return Store(f"s3://{s3.bucket}/{tmp_path.name}", "run")


def all_operations(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.exists("f"),
        lambda: store.list("stage"),
        lambda: store.read_bytes("f"),
        lambda: store.write_bytes("f", b""),
        lambda: store.delete("f"),
        lambda: store.metadata("stage"),
        lambda: store.download("stage"),
        store.check_writable,
        lambda: TreeFolder(store, "trees", ["p"], 1),
    ]


def times(number: int, answer: Answer) -> Callable[[dict[str, Any]], Answer | None]:
    """A fault of the first requests that read an object."""
    left = [answer] * number
    return lambda request: left.pop() if left and reads_an_object(request) else None


def reads_an_object(request: dict[str, Any]) -> bool:
    return request["REQUEST_METHOD"] == "GET" and "list-type" not in request["QUERY_STRING"]


def test_a_bucket_that_does_not_exist_is_named_and_not_created(s3: S3Server) -> None:
    store = Store("s3://misspelt/runs", "run")
    assert store.list("") == []
    with pytest.raises(StoreError, match=r"^storage 's3://misspelt/runs' cannot be written \(The specified bucket"):
        store.check_writable()
    with pytest.raises(StoreError, match=r"^s3://misspelt/runs/run/f cannot be written \(The specified bucket"):
        store.write_bytes("f", b"")
    with pytest.raises(StoreError, match=r"^s3://misspelt/runs/run/f cannot be read \(no such file\)"):
        store.read_bytes("f")
    with pytest.raises(StoreError, match=r"^s3://misspelt/runs/run/stage cannot be read \(no such file\)"):
        store.download("stage")


@pytest.mark.parametrize(
    ("key", "reason"),
    [("wrong", r"(Forbidden|The access key does not exist)"), (None, "Unable to locate credentials")],
)
def test_credentials_that_are_wrong_or_missing(
    s3: S3Server, store: Store, key: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither counts as a file that does not exist, which would repeat finished work."""
    store.write_bytes("f", b"")
    store.finish("stage", {})
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key) if key else monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    if key is None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    for operation in all_operations(Store(store.storage, "run")):
        with pytest.raises(StoreError, match=rf"bucket/.* cannot be \w+ \({reason}\): ") as refused:
            operation()
        assert len(str(refused.value).splitlines()) == 1


def test_an_answer_that_breaks_off_is_asked_for_again(s3: S3Server, store: Store) -> None:
    content = bytes(range(256)) * 4
    store.write_bytes("stage/f", content)
    store.finish("stage", {})
    s3.fault = times(2, s3.broken_off)
    assert store.read_bytes("stage/f") == content
    s3.fault = times(2, s3.broken_off)
    assert (store.download("stage") / "f").read_bytes() == content

    s3.fault = times(99, s3.broken_off)
    for operation in (lambda: store.read_bytes("stage/f"), lambda: store.download("stage")):
        with pytest.raises(StoreError, match=r"cannot be read \(.*not completed.*\): check the storage"):
            operation()


def test_a_server_that_is_too_busy_is_asked_again_with_pauses(s3: S3Server, store: Store) -> None:
    store.write_bytes("f", b"x")
    busy = refusal(503, "SlowDown", "Please reduce your request rate.")
    s3.fault = times(RETRIES - 1, busy)
    assert store.read_bytes("f") == b"x"

    s3.fault, s3.num_requests = lambda _: busy, 0
    with pytest.raises(StoreError, match=r"f cannot be written \(Please reduce your request rate\): check the storage"):
        store.write_bytes("f", b"y")
    assert s3.num_requests == RETRIES
    s3.fault = lambda _: None
    assert store.read_bytes("f") == b"x"


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, s3: S3Server, tmp_path: Path) -> None:
    """Of a damaged or missing marker the work would be repeated."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_connections()
    for operation in all_operations(Store("s3://bucket/runs", "run")):
        with pytest.raises(StoreError, match=r"^s3://bucket/runs/run.* cannot be .*not connect.*: check the storage"):
            operation()


def test_another_process_is_seen_at_once(s3: S3Server, store: Store) -> None:
    """Two instances share no cache, as in two processes."""
    from s3fs import S3FileSystem

    store.write_bytes("stage/a", b"1")
    assert store.list("stage") == ["a"]
    assert not store.exists("stage/b")
    other = S3FileSystem(skip_instance_cache=True)
    other.pipe_file(f"{store.root}/stage/b", b"22")
    assert store.list("stage") == ["a", "b"]
    assert store.exists("stage/b")
    store.finish("stage", {})
    assert store.read_json(f"stage/{MARKER}")["files"] == {"a": 1, "b": 2}
    other.rm(f"{store.root}/stage/a")
    assert store.metadata("stage") is None


def test_folders_exist_while_something_is_in_them(s3: S3Server, store: Store) -> None:
    """Also where other programs have created an object with the folder's name."""
    from s3fs import S3FileSystem

    store.write_bytes("stage/f", b"1")
    S3FileSystem().pipe_file(f"{store.root}/stage/", b"")
    assert store.exists("stage")
    assert store.list("stage") == ["f"]
    store.finish("stage", {})
    assert store.metadata("stage") == {}
    store.delete("stage")
    assert not store.exists("stage")
    assert store.list("stage") == []


def test_a_large_object_appears_when_its_last_part_has_arrived(
    s3: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = b"old", bytes(2 * PART) + b"new"
    store.write_bytes("f", old)
    monkeypatch.setattr(store._fs, "pipe_file", partial(store._fs.pipe_file, chunksize=PART))
    s3.fault = lambda request: (
        refusal(403, "AccessDenied", "Access denied.") if "partNumber=2" in request["QUERY_STRING"] else None
    )
    with pytest.raises(StoreError, match=r"f cannot be written \(Access denied\)"):
        store.write_bytes("f", new)
    assert store.read_bytes("f") == old
    s3.fault = lambda _: None
    store.write_bytes("f", new)
    assert store.read_bytes("f") == new
