"""Two processes that share the base model append the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.root import ROOT
from tests.vllm.conftest import expected, steered
from tests.vllm.test_steered_engine import MIXED, PROMPTS

PROGRAM = """
import json, os, sys
from vllm import LLM, SamplingParams
from mavis_dist.vllm import Steering

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], logits_processors=[Steering], tensor_parallel_size=2, **asked["options"])
    params = [SamplingParams(**one) for one in asked["params"]]
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], params, use_tqdm=False)
    print("answers", json.dumps([list(out.outputs[0].token_ids) for out in outs]))
"""


def test_answers_of_two_processes_are_those_of_this_engine(engine, model, tmp_path):
    prompts = PROMPTS[:16]
    params = [steered(MIXED[i % 4], seed=i, scorer=("lazy", "full")[i % 2], top_p=0.9) for i in range(16)]
    fields = ("max_tokens", "top_k", "top_p", "extra_args")
    asked = {
        "model": model,
        "options": {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16},
        "prompts": prompts,
        "params": [{name: getattr(one, name) for name in fields} for one in params],
    }
    program = tmp_path / "two.py"  # vLLM starts its processes by importing it again
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(asked)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("answers ")]
    assert lines, done.stderr[-4000:]
    assert json.loads(lines[0].removeprefix("answers ")) == expected(engine, prompts, params)
