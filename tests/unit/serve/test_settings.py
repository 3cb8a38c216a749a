"""serve/config.yaml is the service of the quickstart run, in a form that Serve accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mavis_dist import config

pytest.importorskip("ray.serve")
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve._private.build_app import build_app
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from serve import app
from serve.settings import ROOT, MainArgs, ValueArgs, main_args, value_args

FILE = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
QUICKSTART = config.load(ROOT / "jobs/configs/quickstart.yaml")


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


def test_a_misspelt_argument_is_refused():
    with pytest.raises(ValidationError, match="objectve"):
        build(app.build_value, {"run": "r", "objectve": "brief"})


def test_relative_storage_is_below_the_checkout():
    assert Path(MainArgs(run="r").storage) == ROOT / "runs"
    assert MainArgs(run="r", storage="s3://bucket/runs").storage == "s3://bucket/runs"


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_steering_that_json_could_not_tell_is_refused(number):
    for name in ("beta", "tilt_cap"):
        with pytest.raises(ValidationError, match=name):
            MainArgs(run="r", **{name: number})
