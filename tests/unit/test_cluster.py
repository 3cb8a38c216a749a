"""Environment variables that the driver forwards to the cluster."""

from __future__ import annotations

import json

from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.runtime_env.runtime_env import _merge_runtime_env

from mavis_dist.cluster import forwarded_variables


def test_a_job_may_be_submitted_with_variables_that_are_forwarded_without_it(monkeypatch):
    monkeypatch.setenv("MAVIS_CACHE", "/shared/cache")
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    assert forwarded_variables().items() >= {"MAVIS_CACHE": "/shared/cache", "HF_HOME": "/shared/hub"}.items()
    submitted = {"env_vars": {"MAVIS_CACHE": "/shared/cache", "OTHER": "1"}}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": submitted}))
    merged = _merge_runtime_env(submitted, {"env_vars": forwarded_variables()})
    assert merged is not None, "Ray takes both"
    assert merged["env_vars"].items() >= {"MAVIS_CACHE": "/shared/cache", "HF_HOME": "/shared/hub"}.items()
