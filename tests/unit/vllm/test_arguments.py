"""What requests to vLLM may ask for. Without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mavis_dist.decode import RequestError, Scorer
from mavis_dist.sections import Steer
from mavis_dist.types import UserError
from mavis_dist.vllm.arguments import is_cut_by_vllm, request_of
from mavis_dist.vllm.served import VARIABLE, Served, served
from tests.tiny import BOS


@dataclass(frozen=True)
class Params:
    """vLLM's, with its defaults."""

    extra_args: dict[str, Any] | None = None
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False


SERVED = Served(
    dict.fromkeys(("brief", "positive"), Path("/nowhere")), {}, Steer(beta=2.0, tilt_cap=2.5, residual_cap=0.5)
)


def asked(**arguments: Any) -> Params:
    return Params({"objective_weights": {"brief": 1}, **arguments})


@pytest.mark.parametrize(
    "weights", [{"brief": 3, "positive": 1}, "brief=3,positive=1", ["brief=3", "positive=1"], "brief=.75, positive=.25"]
)
def test_weights_in_any_form_that_a_body_may_have(weights):
    request = request_of(asked(objective_weights=weights), SERVED)
    assert request is not None
    assert request.weights == {"brief": 0.75, "positive": 0.25}


def test_what_is_left_out_is_as_the_run_has_it():
    request = request_of(replace(asked(), seed=5, temperature=0.7), SERVED)
    assert request is not None
    assert (request.beta, request.tilt_cap, request.residual_cap, request.scorer) == (2.0, 2.5, 0.5, Scorer.LAZY)
    assert (request.params.top_k, request.params.seed, request.params.temperature) == (40, 5, 0.7)
    given = request_of(asked(beta="4", tilt_cap="none", top_k=9, seed=1, scorer="full", guide_every=2), SERVED)
    assert given is not None
    assert (given.beta, given.tilt_cap, given.params.top_k, given.params.seed) == (4.0, None, 9, 1)
    assert (given.scorer, given.guide_every) == (Scorer.FULL, 2)


@pytest.mark.parametrize("extra", [None, {}, {"session_id": "x"}, {"objective_weights": {"brief": 0}}])
def test_requests_that_ask_for_nothing(extra):
    assert request_of(Params(extra), SERVED) is None
    assert request_of(asked(beta=0), SERVED) is None


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (asked(objective_weights="brief"), "vllm_xargs.objective_weights: is 'brief'; 'brief' is not name=weight"),
        (asked(objective_weights="bref=1"), "vllm_xargs.objective_weights: there is no objective 'bref'"),
        (asked(objective_weights={"brief": float("nan")}), "the weight of 'brief' is nan"),
        (asked(beta=float("inf")), "vllm_xargs.beta: is inf; use a number from 0"),
        (asked(beta="strong"), "vllm_xargs.beta: is 'strong'; input should be a valid number"),
        (asked(tilt_cap=0), "vllm_xargs.tilt_cap: is 0.0; use a number > 0, or none"),
        (asked(top_k=0), "vllm_xargs.top_k: is 0; use an integer from 1"),
        (asked(scorer="qhead"), "vllm_xargs.scorer: is 'qhead'; there is no student for brief"),
        (asked(scorers="full"), "vllm_xargs.scorers: there is no such argument; did you mean 'scorer'?"),
        (asked(preferences="Be kind."), "vllm_xargs.preferences: sentences need further rows"),
        (Params({"beta": 1}), "vllm_xargs.beta: has no effect without objective_weights"),
        (replace(asked(), repetition_penalty=1.2), "repetition_penalty: is 1.2; with objective_weights use 1"),
        (replace(asked(), ignore_eos=True), "ignore_eos: is true; with objective_weights use false"),
        (replace(asked(seed=3), n=2), "vllm_xargs.seed: is 3; with n = 2 give vLLM's own seed"),
        (replace(asked(), temperature=1e9), "temperature: is 1000000000.0; use 0, or a number"),
    ],
)
def test_what_cannot_be_steered(params, problem):
    with pytest.raises(RequestError) as refused:
        request_of(params, SERVED)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("params", "is_cut"),
    [
        (asked(), False),
        (replace(asked(), top_k=40), False),
        (replace(asked(top_k=50), top_k=40), True),
        (replace(asked(), top_p=0.9), True),
        (replace(asked(), min_p=0.1), True),
    ],
)
def test_filters_of_vllm_behind_the_tilt(params, is_cut):
    request = request_of(params, SERVED)
    assert request is not None
    assert is_cut_by_vllm(params, request) is is_cut


def test_the_value_models_that_the_environment_names(finished_run, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(finished_run))
    found = served()
    assert sorted(found.folders) == ["brief", "positive"]
    assert (found.steer.beta, found.failure_id, found.students) == (2.0, BOS, frozenset())
    monkeypatch.setenv(VARIABLE, f" brief = {found.folders['brief']} ,")
    assert served().folders == {"brief": found.folders["brief"]}
    assert served().steer == Steer()
    for value, problem in (
        ("", "MAVIS_VALUES is not set"),
        (str(tmp_path), "is not a finished run"),
        (f"kind={found.folders['brief']}", "holds the objectives brief, not 'kind'"),
        ("brief=/x,brief=/y", "'brief=/y' is not name=folder"),
    ):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(UserError) as refused:
            served()
        assert problem in str(refused.value)
