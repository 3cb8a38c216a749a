"""The service's settings: one section of the config, the arguments of the applications, and serve/config.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs.serve import with_keys
from mavis_dist import config, sections
from mavis_dist.types import UserError

pytest.importorskip("ray.serve")
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve._private.build_app import build_app
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from serve import app
from serve.settings import ROOT, MainArgs, ValueArgs, main_args, value_args

FILE = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
CONFIG = ROOT / "jobs/configs/quickstart.yaml"
QUICKSTART = config.load(CONFIG)


def applications() -> dict[str, dict]:
    return {entry["name"]: entry for entry in FILE["applications"]}


def at_root(args):
    return args.model_copy(update={"storage": str(ROOT / "runs")})


def test_every_key_is_one_that_serve_knows():
    schema = ServeDeploySchema.model_validate(FILE)  # drops keys it does not know
    assert set(FILE) <= set(ServeDeploySchema.model_fields)
    for entry in FILE["applications"]:
        assert set(entry) <= set(ServeApplicationSchema.model_fields)
        for deployment in entry["deployments"]:
            assert set(deployment) <= set(DeploymentSchema.model_fields)
    assert schema.http_options.host == "127.0.0.1"


def test_it_describes_the_quickstart_run():
    entries = applications()
    assert set(entries) == {"main", *(f"value-{name}" for name in QUICKSTART.objectives)}
    assert MainArgs(**entries["main"]["args"]) == at_root(main_args(QUICKSTART))
    for name in QUICKSTART.objectives:
        assert ValueArgs(**entries[f"value-{name}"]["args"]) == at_root(value_args(QUICKSTART, name))


def test_serve_can_build_every_application():
    for entry in FILE["applications"]:
        module, _, function = entry["import_path"].partition(":")
        assert module == app.__name__
        application = build(getattr(app, function), entry["args"])
        built = build_app(application, name=entry["name"], default_runtime_env=None)
        # What is scaled must be there, and have no autoscaler.
        fixed = {d.name for d in built.deployments if d._deployment_config.autoscaling_config is None}
        assert {part["name"] for part in entry["deployments"]} <= fixed


# Another value than the default's, of every setting of the section `serve`.
OTHER_SETTINGS = {
    "host": "0.0.0.0",
    "port": 9,
    "placement": "colocated",
    "served_model_name": "mine",
    "base_replicas": 2,
    "value_replicas": 2,
    "cpus_per_replica": 2,
    "gpus_per_replica": 1,
    "rows": 3,
    "cache_tokens": 500,
    "queue": 7,
    "max_tokens": 9,
    "max_prompt_tokens": 8,
    "max_n": 2,
    "max_preferences": 3,
    "stall_s": 5,
    "deadline_s": 9,
    "stream_interval_ms": 0,
    "threads": 3,
    "target_load": 0.5,
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
    "keys": "/shared/keys.json",
    "cors_origins": ["https://page.example"],
    "max_body_bytes": 1000,
    "log_access": False,
    "log_prompts": True,
}
ELSEWHERE = {"host", "port"}  # of Serve itself: http_options in a file
# What the arguments take from other sections of the config.
OTHERS = {
    "storage",
    "run",
    "dtype",
    "device",
    "base",
    "engine",
    "tensor_parallel",
    "system",
    "beta",
    "tilt_cap",
    "residual_cap",
    "objective",
}


def changed(args: MainArgs | ValueArgs, others: MainArgs | ValueArgs) -> set[str]:
    return {name for name, value in args.model_dump().items() if value != getattr(others, name)}


def test_every_argument_can_be_set_in_the_config_and_every_setting_is_an_argument():
    assert set(OTHER_SETTINGS) == set(sections.Serve.model_fields)
    reached: set[str] = set()
    for name, value in OTHER_SETTINGS.items():
        other = config.load(CONFIG, [f"serve.{name}={json.dumps(value)}"])
        main = changed(main_args(other), main_args(QUICKSTART))
        of_value = changed(value_args(other, "brief"), value_args(QUICKSTART, "brief"))
        assert bool(main | of_value) == (name not in ELSEWHERE - {"host"}), name
        reached |= main | of_value
    assert reached == {*MainArgs.model_fields, *ValueArgs.model_fields} - OTHERS


def test_overrides_reach_the_application():
    overrides = ["serve.queue=7", "serve.deadline_s=9", "serve.cors_origins=[https://page.example]", "steer.beta=2"]
    args = main_args(config.load(CONFIG, overrides))
    assert (args.queue, args.deadline_s, args.beta) == (7, 9, 2)
    assert args.cors_origins == ("https://page.example",)


def test_a_setting_has_the_same_bounds_and_default_in_file_and_config():
    section, main = sections.Serve(), MainArgs(run="r")
    for name in sections.MainSettings.model_fields.keys() - {"keys"}:
        assert getattr(section, name) == getattr(main, name)
    for bad in ({"max_n": 0}, {"queue": 0}, {"stall_s": 0}, {"keys": ""}, {"max_preferences": -1}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            MainArgs(run="r", **bad)
        with pytest.raises(ValidationError, match=next(iter(bad))):
            sections.Serve(**bad)


@pytest.mark.parametrize(
    ("host", "given", "variable", "taken"),
    [
        ("127.0.0.1", None, None, "none"),
        ("0.0.0.0", None, None, f"{ROOT}/keys.json"),
        ("0.0.0.0", None, "none", "none"),
        ("127.0.0.1", None, "/shared/a.json", "/shared/a.json"),
        ("127.0.0.1", "mine.json", None, f"{ROOT}/mine.json"),
        ("0.0.0.0", "none", "/shared/a.json", "none"),
    ],
)
def test_the_key_file_of_config_and_environment(host, given, variable, taken, monkeypatch):
    if variable is None:
        monkeypatch.delenv("MAVIS_KEYS", raising=False)
    else:
        monkeypatch.setenv("MAVIS_KEYS", variable)
    asked = config.load(CONFIG, [f"serve.host={host}", f"serve.keys={json.dumps(given)}"])
    assert main_args(with_keys(asked)).keys == taken


@pytest.mark.parametrize("variable", ["", "  "])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_empty_key_variable_is_refused(host, variable, monkeypatch):
    monkeypatch.setenv("MAVIS_KEYS", variable)
    with pytest.raises(UserError, match=r"MAVIS_KEYS is .*: set it to a file of API keys .* or unset it"):
        with_keys(config.load(CONFIG, [f"serve.host={host}"]))


def test_a_run_stored_with_fewer_settings_is_still_read():
    stored = QUICKSTART.model_dump(mode="json")
    stored["serve"] = {
        name: stored["serve"][name]
        for name in (
            "host",
            "port",
            "placement",
            "base_replicas",
            "value_replicas",
            "cpus_per_replica",
            "gpus_per_replica",
            "rows",
            "max_tokens",
        )
    }
    assert config.parse(stored) == QUICKSTART


def test_a_misspelt_argument_is_refused():
    with pytest.raises(ValidationError, match="objectve"):
        build(app.build_value, {"run": "r", "objectve": "brief"})


def test_relative_storage_is_below_the_checkout():
    assert Path(MainArgs(run="r").storage) == ROOT / "runs"
    assert MainArgs(run="r", storage="s3://bucket/runs").storage == "s3://bucket/runs"


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_steering_that_json_cannot_express_is_refused(number):
    for name in ("beta", "tilt_cap", "residual_cap"):
        with pytest.raises(ValidationError, match=name):
            MainArgs(run="r", **{name: number})


def test_the_served_name_of_the_model_is_that_of_the_config_unless_given():
    assert main_args(QUICKSTART).model_name == QUICKSTART.base.model
    assert main_args(config.load(CONFIG, ["serve.served_model_name=mine"])).model_name == "mine"
