"""API keys: made once, stored as hashes, added and removed while the service runs."""

from __future__ import annotations

import json
import os
import stat
import time

import pytest

from jobs import keys as job
from serve.gateway import api_keys
from serve.gateway.api_keys import KeyFileError, Keys
from serve.settings import NO_KEYS, MainArgs


@pytest.fixture
def file(tmp_path):
    return tmp_path / "below" / "keys.json"


def test_a_key_belongs_to_its_name_and_is_not_in_the_file(file):
    first, second = api_keys.add(file, "ann"), api_keys.add(file, "bob")
    known = Keys(file)
    assert (known.owner(first), known.owner(second)) == ("ann", "bob")
    for wrong in ("", first[:-1], first + "x", first.upper(), json.loads(file.read_text())["ann"], "\udc80", "é"):
        assert known.owner(wrong) is None
    assert first not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(first) > 40
    assert os.listdir(file.parent) == ["keys.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(file, monkeypatch):
    key = api_keys.add(file, "ann")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KeyFileError, match="No space left"):
        api_keys.add(file, "bob")
    assert os.listdir(file.parent) == ["keys.json"]
    assert Keys(file).owner(key) == "ann"


def test_keys_come_and_go_while_the_service_runs(file):
    first = api_keys.add(file, "ann")
    known = Keys(file, fresh_s=0)
    second = api_keys.add(file, "bob")
    assert known.owner(second) == "bob"
    api_keys.remove(file, "ann")
    assert known.owner(first) is None


def test_a_file_that_is_damaged_later_does_not_lock_people_out(file, caplog):
    key = api_keys.add(file, "ann")
    known = Keys(file, fresh_s=0)
    file.write_text("{")
    assert known.owner(key) == "ann"
    assert "stay in force" in caplog.text
    file.unlink()
    assert known.owner(key) == "ann"


def test_the_file_is_checked_at_intervals_only(file, monkeypatch):
    api_keys.add(file, "ann")
    known = Keys(file, fresh_s=60)
    monkeypatch.setattr(api_keys, "_stamp", lambda _: pytest.fail("looked"))
    known.owner("x")
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    with pytest.raises(pytest.fail.Exception):
        known.owner("x")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"ann": "secret"}', '{"ann": 1}', '{"": "' + "0" * 64 + '"}'])
def test_a_file_that_is_not_one_of_ours_is_refused(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(KeyFileError, match="cannot be read"):
        Keys(file)


def test_a_missing_file_says_how_to_make_one(file):
    with pytest.raises(KeyFileError, match=r"jobs\.keys add NAME --file"):
        Keys(file)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "é", "a" * 65])
def test_a_name_unfit_for_a_log_is_refused(file, name):
    with pytest.raises(KeyFileError, match="is not 1 to 64"):
        api_keys.add(file, name)


def test_the_command(file, capsys):
    job.main(["add", "ann", "--file", str(file)])
    key = capsys.readouterr().out.strip()
    assert Keys(file).owner(key) == "ann"
    job.main(["list", "--file", str(file)])
    assert capsys.readouterr().out == "ann\n"
    for refused in (["add", "ann"], ["remove", "bob"]):
        with pytest.raises(SystemExit) as end:
            job.main([*refused, "--file", str(file)])
        assert end.value.code == 2
        assert "error: " in capsys.readouterr().err
    job.main(["remove", "ann", "--file", str(file)])
    assert Keys(file).owner(key) is None


def test_keys_are_required_by_default():
    assert MainArgs(run="r").keys.endswith("/keys.json")
    assert MainArgs(run="r", keys=NO_KEYS).keys == NO_KEYS
