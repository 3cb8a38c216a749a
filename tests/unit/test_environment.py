"""Environment variables that are empty count as not set; those that Ray would misread are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import arguments
from mavis_dist import cluster, environment
from mavis_dist.types import UserError
from tests.local import listening_nowhere
from tests.root import ROOT


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("RAY_AUTH_MODE", "tokens", "token or disabled"),
        ("RAY_AUTH_MODE", "k8s", "token or disabled"),
        ("RAY_TRAIN_V2_ENABLED", "0", "1"),
        ("RAY_SERVE_PROXY_USE_GRPC", "yes", "0 or 1"),
        ("RAY_USAGE_STATS_ENABLED", "false", "0 or 1"),
        ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "fast", "a number of seconds"),
        ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0", "a number of seconds"),
        ("OMP_WAIT_POLICY", "lazy", "passive or active"),
    ],
)
def test_a_value_that_would_be_misread_is_refused(monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is '{value}': set it to {remedy}, or unset it"):
        environment.check()


@pytest.mark.parametrize("mode", ["token", "Token", "disabled"])
def test_modes_of_authentication(monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    environment.check()


def test_empty_variables_get_the_defaults_of_the_project():
    empty = dict.fromkeys(environment.ENVIRONMENT, "")
    script = (
        "import os; from mavis_dist import environment as e; e.check(); print(all(map(os.environ.get, e.ENVIRONMENT)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=empty, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("address", [None, "", " ", "local"])
def test_without_an_address_no_cluster_is_joined(monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.is_local()


def test_folders_are_forwarded_as_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MAVIS_CACHE", "cache")
    monkeypatch.setenv("HF_HOME", "~/hub")
    forwarded = environment.forwarded()
    assert forwarded["MAVIS_CACHE"] == str(tmp_path / "cache")
    assert forwarded["HF_HOME"] == "/home/me/hub"
    monkeypatch.setenv("HF_HOME", "")
    assert "HF_HOME" not in environment.forwarded()


def test_a_user_without_a_home_is_told_to_name_the_cache(monkeypatch):
    monkeypatch.setenv("MAVIS_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="MAVIS_CACHE is '~no-such-user/cache': the home folder is unknown"):
        environment.cache_folder()


def home_of(monkeypatch, home, listed):
    """What counts as home for a value of HOME and what the list of users has; None: not set, not listed."""

    def entry(number):
        if listed is None:
            raise KeyError(number)
        return SimpleNamespace(pw_dir=listed)

    monkeypatch.setattr("pwd.getpwuid", entry)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    return environment.home()


def test_a_home_is_a_folder_that_this_user_may_write_to(monkeypatch, tmp_path):
    mine, listed, read_only = (tmp_path / name for name in ("mine", "listed", "read-only"))
    for folder in (mine, listed, read_only):
        folder.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr("os.access", lambda path, mode: path != str(read_only) and access(path, mode))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert home_of(monkeypatch, str(mine), str(listed)) == str(mine)
    for home in (None, "", " ", "/", "//", "mine", str(tmp_path / "none"), str(tmp_path / "file"), str(read_only)):
        assert home_of(monkeypatch, home, str(listed)) == str(listed), home
        for listed_as in (None, "/", "/nonexistent", ""):
            assert home_of(monkeypatch, home, listed_as) == environment.private_folder(), (home, listed_as)


def test_a_container_without_a_home_has_a_cache(tmp_path):
    script = (
        "import pwd; pwd.getpwuid = {}.__getitem__; from mavis_dist import environment as e; print(e.cache_folder())"
    )
    given = {"HOME": "/", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/mavis-home-{os.getuid()}/.cache/mavis_dist\n", done.stderr


def test_blanks_around_a_variable_do_not_change_its_meaning():
    script = (
        "from mavis_dist import cluster; cluster.environment.check(); cluster._check_mode(); import os;"
        "print([os.environ[name] for name in ('RAY_AUTH_MODE', 'OMP_WAIT_POLICY', 'RAY_TRAIN_V2_ENABLED')])"
    )
    given = {"PATH": "/usr/bin", "RAY_AUTH_MODE": " token ", "OMP_WAIT_POLICY": "active\n", "RAY_TRAIN_V2_ENABLED": " "}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.stdout == "['token', 'active', '1']\n", done.stderr


def test_a_private_folder_is_nobody_elses(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = environment.private_folder()
    assert environment.private_folder() == mine
    assert Path(mine).stat().st_mode & 0o077 == 0
    Path(mine).chmod(0o777)
    assert environment.private_folder() != mine
    Path(mine).rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    Path(mine).symlink_to(tmp_path / "elsewhere")
    assert environment.private_folder() != mine


def test_a_cluster_of_nobody_is_an_error_within_half_a_minute(monkeypatch, capsys):
    assert cluster.CONNECT_S < 30
    monkeypatch.setattr(cluster, "CONNECT_S", 1.0)
    with listening_nowhere() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(SystemExit) as end:
            arguments.refusing(cluster.connect)
    assert end.value.code == 2
    assert time.monotonic() - began < 10
    [line] = capsys.readouterr().err.splitlines()
    assert f"RAY_ADDRESS=127.0.0.1:{port} does not answer as a Ray cluster" in line
    assert "unset it to start a local one" in line


def test_the_cluster_that_was_started_last_is_an_error_if_it_has_ended(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with listening_nowhere() as port:
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda folder: f"127.0.0.1:{port}")
        with pytest.raises(UserError, match=rf"RAY_ADDRESS=\S+:{port} does not answer as a Ray cluster"):
            cluster.connect()
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda folder: None)
    with pytest.raises(UserError, match=r"RAY_ADDRESS=auto finds no Ray cluster on this machine: .*unset it"):
        cluster.connect()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.org"])
def test_the_address_of_a_dashboard_is_named_at_once(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="is the address of a dashboard"):
        cluster.connect()


def test_a_port_that_is_taken_is_named():
    with listening_nowhere() as port, pytest.raises(UserError, match=f"serve.port={port} cannot be listened on"):
        cluster.check_port("127.0.0.1", port)
    cluster.check_port("127.0.0.1", port)
    with pytest.raises(UserError, match=r"serve\.host=no\.such\.host\.invalid"):
        cluster.check_port("no.such.host.invalid", 8000)


def test_ray_imported_before_its_mode_was_set_is_named():
    script = (
        "import ray; from jobs import arguments; from mavis_dist import cluster; arguments.refusing(cluster.connect)"
    )
    environment_ = {"PATH": "/usr/bin", "RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment_, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "export it before Python starts" in done.stderr.splitlines()[-1]
