"""Engines that answer the same prompts: the built-in one, vLLM, vLLM with steering, the built-in one over vLLM.

As programs (benchmarks/common/lines.py), each with the threads that suit it best.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams
from mavis_dist.decode.load_guide import load_guide
from mavis_dist.llm import open_run
from mavis_dist.models import value
from mavis_dist.models.fetch import fetch
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.prompts import load_prompts
from mavis_dist.store import values
from mavis_dist.vllm import rows
from mavis_dist.vllm.served import VARIABLE

if TYPE_CHECKING:
    from benchmarks.common.lines import Decode

MAX_ROWS, MAX_LENGTH, THREADS = 32, 1024, 2
NUM_PROMPTS = 50  # unseen ones, at least
BETA, CAP = 3.0, 3.0
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Work:
    """Models and prompts of a finished run."""

    model: str
    objectives: tuple[str, str]
    layers: int
    folders: dict[str, Path]  # of a value model for each objective
    prompts: list[tuple[int, ...]]

    @classmethod
    @contextmanager
    def of_run(cls, run: Path) -> Iterator[Work]:
        """The first two objectives; heads on one trunk are split into two models. Raises UserError."""
        torch.set_num_threads(THREADS)
        config, store = open_run(run)
        published = values.published_folders(store)
        objectives = tuple(sorted(published))[:2]
        base = load_base(config.base.model)
        with tempfile.TemporaryDirectory() as folder:
            folders = {}
            for name in objectives:
                model, card = value.load_objective(values.fetch_folder(store, published[name]), name)
                folders[name] = Path(folder, name)
                value.save(model, card, folders[name])
            drawn = config.prompts.model_copy(update={"evaluation": max(NUM_PROMPTS, config.prompts.evaluation)})
            _, unseen = load_prompts(drawn, config.seed)
            prompts = [base.chat(prompt.messages, config.base.system) for prompt in unseen]
            layers = model.backbone.config.num_hidden_layers
            work = cls(config.base.model, objectives, layers, folders, prompts)  # type: ignore[arg-type]
            work.enter()
            yield work

    def enter(self) -> None:
        """Let engines of this process use the value models."""
        torch.set_num_threads(THREADS)
        os.environ |= SETTINGS
        os.environ[VARIABLE] = ",".join(f"{name}={path}" for name, path in self.folders.items())

    @property
    def weights(self) -> dict[str, float]:
        return dict.fromkeys(self.objectives, 0.5)

    @cached_property
    def directory(self) -> str:
        return str(fetch(self.model))

    def vllm(self, dtype: str, is_steered: bool, is_compiled: bool = False, **options: Any) -> Any:
        """vLLM's engine in this process; `options` are others of its own."""
        from vllm import LLM

        from mavis_dist.vllm import Steering

        return LLM(
            self.directory,
            dtype=dtype,
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_ROWS,
            enforce_eager=not is_compiled,
            logits_processors=[Steering] if is_steered else [],
            **options,
        )

    def engine(self, dtype: str, is_over_vllm: bool = False, is_endless: bool = False) -> Engine:
        """This project's engine; `is_endless`: no token ends an answer but the last of the vocabulary."""
        base: BaseModel = (
            rows.load_base(self.model, dtype, "cpu", MAX_ROWS) if is_over_vllm else load_base(self.model, dtype)
        )
        if is_endless:
            base = replace(base, eos_ids=(base.model.config.vocab_size - 1,))
        guide: LocalGuide = load_guide(self.folders, getattr(torch, dtype))
        return Engine(base, guide, MAX_ROWS)


def ask_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    weights: dict[str, float],
    tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    params = SamplingParams(tokens, temperature)
    requests = [
        Request(str(i), tuple(prompt), weights, BETA, CAP, replace(params, seed=i)) for i, prompt in enumerate(prompts)
    ]
    return [choices[0].tokens for choices in engine.generate(requests)]


def ask_vllm(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    weights: dict[str, float],
    tokens: int,
    temperature: float = 1.0,
    least: int = 0,
    scorer: str = "lazy",
) -> list[list[int]]:
    """`least`: tokens that an answer has at least."""
    from vllm import SamplingParams as Params

    steering = {"objective_weights": weights, "beta": BETA, "tilt_cap": CAP, "scorer": scorer}
    params = [
        Params(
            max_tokens=tokens,
            min_tokens=least,
            temperature=temperature,
            top_k=40,
            extra_args={**steering, "seed": i} if weights else None,
        )
        for i in range(len(prompts))
    ]
    outs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


def load(options: dict[str, Any]) -> dict[str, Decode]:
    """The variants of one engine, whose name is an option."""
    name, folders = options["name"], {objective: Path(folder) for objective, folder in options["folders"].items()}
    work = Work(options["model"], tuple(folders), 0, folders, [])
    work.enter()
    if name in ("built_in", "rows"):
        engine = work.engine("bfloat16", is_over_vllm=name == "rows", is_endless=True)

        def ask(weights: dict[str, float], prompts: list[list[int]], tokens: int, seed: int) -> int:
            return sum(map(len, ask_engine(engine, prompts, weights, tokens)))

        variants = {"plain": {}, "steered": work.weights}
        return {f"{name} {variant}": partial(ask, weights) for variant, weights in variants.items()}
    engines = {is_steered: work.vllm("bfloat16", is_steered, options["is_compiled"]) for is_steered in (False, True)}

    def ask_of(is_steered: bool, weights: dict[str, float], prompts: list[list[int]], tokens: int, seed: int) -> int:
        return sum(map(len, ask_vllm(engines[is_steered], prompts, weights, tokens, least=tokens)))

    return {
        f"{name} plain": partial(ask_of, False, {}),
        f"{name} plain, with the processor": partial(ask_of, True, {}),
        f"{name} steered": partial(ask_of, True, work.weights),
    }


if __name__ == "__main__":
    from benchmarks.common.lines import serve

    serve("torch", load)
