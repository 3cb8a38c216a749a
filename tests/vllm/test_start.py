"""What cannot be steered is refused when vLLM starts, in one line."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm

from mavis_dist.vllm import Steering
from mavis_dist.vllm.served import VARIABLE, served
from tests.root import ROOT
from tests.tiny import write_base


def refused(llm, **changes):
    """The line with which a processor refuses to start."""
    config = SimpleNamespace(
        model_config=llm.llm_engine.vllm_config.model_config,
        speculative_config=None,
        parallel_config=llm.llm_engine.vllm_config.parallel_config,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(SystemExit) as ended:
        Steering(config, torch.device("cpu"), False)
    [line] = str(ended.value).splitlines()
    assert line.startswith("mavis_dist.vllm: ")
    return line.removeprefix("mavis_dist.vllm: ")


def test_vllm_itself_does_not_start(start, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(
        SystemExit, match=r"mavis_dist.vllm: environment variable MAVIS_VALUES: .*/nothing is not a finished"
    ):
        start()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "environment variable MAVIS_VALUES is not set: set it to the folder or URI of a finished run"),
        ("brief", "brief is not a finished run"),
        ("brief=", "'brief=' is not name=folder"),
        ("brief=/nowhere", "/nowhere/mavis.json cannot be read"),
    ],
)
def test_value_models_that_are_not_there(llm, monkeypatch, value, problem):
    monkeypatch.setenv(VARIABLE, value)
    assert problem in refused(llm)


def test_a_value_model_has_the_objective_that_it_is_named_for(llm, run, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"kind={served().folders['brief']}")
    assert "holds the objectives brief, not 'kind'" in refused(llm)


def test_value_models_of_another_base_model(llm, run, tmp_path, monkeypatch):
    other = write_base(tmp_path, eos_weight=0.1, head_size=32)
    config = copy.copy(llm.llm_engine.vllm_config.model_config)
    config.model = config.tokenizer = str(other)
    assert "was trained for base model" in refused(llm, model_config=config)


def test_hosts_that_were_not_tested(llm, monkeypatch):
    assert "speculative decoding" in refused(llm, speculative_config=object())
    assert "pipeline stages" in refused(llm, parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    assert "vLLM 0.99.0 was not tested with this mavis_dist: install 0.32.0" in refused(llm)


def test_folders_may_be_named_one_by_one(run, monkeypatch):
    folders = served().folders
    monkeypatch.setenv(VARIABLE, ",".join(f"{name}={folder}" for name, folder in folders.items()))
    assert served().folders == folders
    assert served().steer.beta != 2.0  # the default, not that of a run


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_of_vllms_processes_wait_as_without_it(given):
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    program = "import os; from mavis_dist.vllm import Steering; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {**variables, "PYTHONPATH": str(ROOT), **({"OMP_WAIT_POLICY": given} if given else {})}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(given)
