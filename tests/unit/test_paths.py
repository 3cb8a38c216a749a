"""Paths of a config mean the same in every process; results never lie where nobody finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mavis_dist.config import Config, ConfigError, conflicts, load, parse
from mavis_dist.models.fetch import NAMED
from mavis_dist.sections import NAMED_MODELS
from serve.settings import MainArgs, main_args

REWARDS = {"brief": {"reward": "brevity"}}


def config(**settings: Any) -> Config:
    return parse({"run": "r", "objectives": REWARDS, **settings})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model in it; the home folder is beside it."""
    folder = tmp_path / "here"
    (folder / "my-model").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def package_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a Ray job that was submitted with a working_dir."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_every_path_of_a_config_is_expanded_and_absolute(here: Path) -> None:
    home = here.parent / "home"
    made = config(
        storage="~/runs",
        base={"model": "./my-model"},
        value={"backbone": "../value-model"},
        prompts={"source": "mine.jsonl"},
        objectives={
            "kind": {"reward": "classifier", "model": "~/classifiers/kind"},
            "near": {"reward": "relevance", "model": "my-model"},
        },
    )
    assert made.storage == f"{home}/runs"
    assert made.base.model == f"{here}/my-model"
    assert made.value.backbone == f"{here.parent}/value-model"
    assert made.prompts.source == f"{here}/mine.jsonl"
    assert made.objectives["kind"].model == f"{home}/classifiers/kind"
    assert made.objectives["near"].model == f"{here}/my-model"
    os.chdir(here.parent)
    assert parse(yaml.safe_load(yaml.safe_dump(made.model_dump(mode="json")))) == made


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("runs", "{here}/runs"),
        (" runs ", "{here}/runs"),
        ("file://{here}/x/../y", "{here}/y"),
        ("file:{here}/x", "{here}/x"),
        ("file://localhost{here}/x", "{here}/x"),
        ("local:{here}/x", "{here}/x"),
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("a:b/c", "{here}/a:b/c"),
    ],
)
def test_storage_is_absolute_or_a_uri(here: Path, given: str, taken: str) -> None:
    assert config(storage=given.format(here=here)).storage == taken.format(here=here)


@pytest.mark.parametrize("key", ["storage", "base.model", "value.backbone", "prompts.source"])
@pytest.mark.parametrize("value", [" ~/x.jsonl", "file:{home}/x.jsonl", "file://localhost{home}/x.jsonl", "~/x.jsonl "])
def test_ways_to_write_a_path_mean_the_same(here: Path, key: str, value: str) -> None:
    home, (section, _, name) = here.parent / "home", key.partition(".")
    written = value.format(home=home)
    made: Any = config(**({section: {name: written}} if name else {section: written}))
    found = getattr(getattr(made, section), name) if name else made.storage
    assert found == f"{home}/x.jsonl"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("$HOME/runs", "variables are not expanded: write their values, or ~"),
        ("${SCRATCH}/runs", "variables are not expanded"),
        ("/scratch/$USER/runs", "variables are not expanded"),
        ("s3://bucket/$USER", "variables are not expanded"),
        ("s3:/bucket/runs", "a URI has two slashes: write s3://"),
        ("gs:/bucket/runs", "a URI has two slashes: write gs://"),
    ],
)
def test_a_path_that_would_be_a_folder_of_an_odd_name_is_refused(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"'storage' is .*{problem}"):
        config(storage=value)


@pytest.mark.parametrize("value", ["$MODELS/x", "${MODELS}/x.gguf", "./$X"])
def test_variables_in_names_of_models_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"'base.model' is .*variables are not expanded"):
        config(base={"model": value})


def test_the_default_storage_is_absolute(here: Path) -> None:
    assert config().storage == f"{here}/runs"


def test_names_that_are_no_paths_stay(here: Path) -> None:
    """Even with folders of these names beside them, those that a word of the config hides."""
    for name in (*NAMED_MODELS, "base", "builtin"):
        (here / name).mkdir()
    made = config(base={"model": "smollm2-135m-instruct"}, value={"backbone": "base"})
    assert (made.base.model, made.value.backbone, made.prompts.source) == ("smollm2-135m-instruct", "base", "builtin")
    assert config(base={"model": "org/name"}, prompts={"source": "Org/data-set"}).base.model == "org/name"
    assert config(prompts={"source": "Org/data-set"}).prompts.source == "Org/data-set"


def test_the_named_models_are_those_that_can_be_fetched() -> None:
    assert set(NAMED_MODELS) == NAMED.keys()


def test_the_service_gets_absolute_paths(here: Path) -> None:
    made = config(base={"model": "my-model"})
    assert main_args(made).base == MainArgs(run="r", base="./my-model").base == f"{here}/my-model"
    assert main_args(made).storage == f"{here}/runs"


def test_a_run_that_was_started_with_a_relative_path_goes_on(here: Path) -> None:
    old = config(base={"model": "./my-model"})
    assert conflicts(old, config(base={"model": f"{here}/my-model"})) == []


@pytest.mark.parametrize("key", ["storage", "base.model", "value.backbone", "prompts.source"])
@pytest.mark.parametrize(("value", "problem"), [("", "at least 1 character"), ("~nobody-here/x", "home folder")])
def test_an_empty_path_and_an_unknown_home_are_refused(tmp_path: Path, key: str, value: str, problem: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"run": "r", "objectives": REWARDS}))
    with pytest.raises(ConfigError, match=rf"config key '{key}' is '{value}': .*{problem}"):
        load(file, [f"{key}='{value}'"])


@pytest.mark.parametrize("storage", [{}, {"storage": "runs"}, {"storage": "./"}, {"storage": "file://x"}])
def test_relative_storage_in_the_copy_of_a_job_is_refused(package_copy: Path, storage: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"'storage' is .* Ray's copy .*: give an absolute path .* or a URI"):
        config(**storage)
    with pytest.raises(ConfigError, match="Ray's copy"):
        config(storage=str(package_copy / "deeper" / "runs"))
    assert config(storage="/shared/runs").storage == "/shared/runs"
    assert config(storage="gs://bucket/runs").storage == "gs://bucket/runs"


def test_inputs_that_travel_with_a_job_stay_relative(package_copy: Path) -> None:
    """All its processes run in a copy, which has another path in the next attempt: the run must not seem another."""
    made = config(storage="/shared/runs", base={"model": "./my-model"}, prompts={"source": "mine.jsonl"})
    assert (made.base.model, made.prompts.source) == ("./my-model", "mine.jsonl")
    assert config(storage="/shared/runs", base={"model": "/models/mine"}).base.model == "/models/mine"
