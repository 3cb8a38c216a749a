"""What actors and replicas of this project do with `base.engine: vllm`."""

from __future__ import annotations

import pytest
import yaml

from mavis_dist.config import ConfigError, load
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.groups import BaseGroup
from tests.root import ROOT
from tests.vllm.test_steered_engine import PROMPTS


def test_a_group_of_one_process_lets_vllm_compute(model, base, llm):
    found = BaseGroup(model, "float32", "cpu", engine="vllm", rows=4).base
    assert (found.fingerprint, found.tokenizer_fingerprint) == (base.fingerprint, base.tokenizer_fingerprint)
    asked = [Request(str(i), tuple(prompt), params=SamplingParams(20, seed=i)) for i, prompt in enumerate(PROMPTS[:8])]
    ours, theirs = Engine(found, max_rows=4).generate(asked), Engine(base, max_rows=4).generate(asked)
    assert [choices[0].tokens for choices in ours] == [choices[0].tokens for choices in theirs]


@pytest.mark.parametrize("override", ["base.tensor_parallel=2", "value.kind=states"])
def test_what_vllm_does_not_give_is_refused(override):
    with pytest.raises(ConfigError, match=r"base\.engine=vllm"):
        load(ROOT / "jobs" / "configs" / "quickstart.yaml", ["base.engine=vllm", "value.layers=null", override])


def test_ray_serve_llm_takes_the_example():
    from ray.serve.llm import LLMConfig
    from ray.serve.schema import ServeDeploySchema

    deployed = yaml.safe_load((ROOT / "serve" / "vllm.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(deployed).applications
    [config] = [LLMConfig.model_validate(one) for one in application.args["llm_configs"]]
    assert config.engine_kwargs["logits_processors"] == ["mavis_dist.vllm:Steering"]
