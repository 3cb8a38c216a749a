"""vLLM with steering in this process, on a tiny random model. In the environment of `make install-vllm` only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that tests see the processor
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from mavis_dist.decode import Engine, Request, SamplingParams, Scorer
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.llm import open_run
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.vllm.served import VARIABLE
from tests.tiny import BOS, MODEL, write_run

OBJECTIVES = ("brief", "positive")
BETA, CAP = 2.0, 2.5  # of `write_run`
OWN = ("scorer", "beta", "tilt_cap", "guide_every")
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "seed": 0,
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; MAVIS_VALUES names it."""
    folder = write_run(tmp_path_factory.mktemp("run"), "run", OBJECTIVES, eos_weight=0.6, head_size=32)
    os.environ[VARIABLE] = str(folder)
    return folder


@pytest.fixture(scope="session")
def model(run: Path) -> str:
    return str(run.parent.parent / MODEL)


@pytest.fixture(scope="session")
def start(model: str) -> Callable[..., Any]:
    """Starts vLLM with steering; arguments are those of `vllm.LLM`."""
    from vllm import LLM

    from mavis_dist.vllm import Steering

    def start(**options: Any) -> Any:
        return LLM(model, **{"logits_processors": [Steering], **OPTIONS, **options})

    return start


@pytest.fixture(scope="session")
def llm(start: Callable[..., Any]) -> Any:
    return start()


@pytest.fixture(scope="session")
def base(model: str) -> BaseModel:
    return load_base(model)


@pytest.fixture(scope="session")
def engine(run: Path, base: BaseModel) -> Engine:
    """This project's engine with the same models."""
    _, store = open_run(run)
    return Engine(base, load_guide(fetch_published(store)))


def steered(weights: dict[str, float] | None = None, seed: int = 1, max_tokens: int = 24, **arguments: Any) -> Any:
    """vLLM's SamplingParams of a steered request."""
    from vllm import SamplingParams as Params

    own = {name: arguments.pop(name) for name in OWN if name in arguments}
    extra = {"objective_weights": weights or {"brief": 1.0}, "seed": seed, **own}
    return Params(**{"max_tokens": max_tokens, "top_k": 40, "extra_args": extra, **arguments})


def seeded_by_vllm(seed: int | None, n: int = 1) -> Any:
    """As `steered`, with vLLM's own seed, which it gives each of several answers."""
    from vllm import SamplingParams as Params

    return Params(max_tokens=24, seed=seed, n=n, extra_args={"objective_weights": {"brief": 1.0}})


def expected(engine: Engine, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    """The answers of this engine, up to the token at which vLLM stops because it marks failures."""
    requests = []
    for i, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
        extra = given.extra_args
        sampling = SamplingParams(
            given.max_tokens, given.temperature, max(given.top_k, 0) or 40, given.top_p, given.min_p, extra["seed"]
        )
        one = Request(str(i), tuple(prompt), extra["objective_weights"], extra.get("beta", BETA), CAP, sampling)
        if "tilt_cap" in extra:
            one = replace(one, tilt_cap=extra["tilt_cap"])
        scorer, guide_every = Scorer(extra.get("scorer", "lazy")), extra.get("guide_every", 1)
        requests.append(replace(one, scorer=scorer, guide_every=guide_every))
    answers = [choices[0].tokens for choices in engine.generate(requests)]
    return [answer[: answer.index(BOS) + 1] if BOS in answer else answer for answer in answers]


def generate(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    """The answers of vLLM."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(inputs, params, use_tqdm=False)]
