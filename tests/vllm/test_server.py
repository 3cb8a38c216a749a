"""vLLM's server with steering, for the official client."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import openai
import pytest

from mavis_dist.vllm.served import VARIABLE
from tests.root import ROOT
from tests.vllm.conftest import expected, steered

START_S = 240


@contextmanager
def running(model, log, **environment):
    """The URL of a server, or the process that ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        "tiny",
    ]
    command += ["--logits-processors", "mavis_dist.vllm:Steering", "--middleware", "mavis_dist.vllm.body.SteeredBody"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "8"]
    template = log.with_name("template.jinja")
    template.write_text("{{ messages[0]['content'] }}")
    command += ["--chat-template", str(template)]
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        **environment,
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and not answers(f"http://127.0.0.1:{port}/health"):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1" if process.poll() is None else process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with running(model, tmp_path_factory.mktemp("server") / "log") as url:
        assert isinstance(url, str)
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)


PROMPT = [0, 5, 9, 33, 60, 61]


def complete(client, **fields):
    fields = {"max_tokens": 24, "seed": 3, **fields}
    out = client.completions.create(model="tiny", prompt=PROMPT, extra_body=fields.pop("body", {}), **fields)
    return [choice.text for choice in out.choices]


def test_the_body_of_this_projects_endpoint_steers(client, engine, base):
    [tokens] = expected(engine, [PROMPT], [steered({"brief": 0.7, "positive": 0.3}, seed=3, beta=4.0, top_k=40)])
    text = base.tokenizer.decode(tokens, skip_special_tokens=True)
    body = {"objective_weights": {"brief": 0.7, "positive": 0.3}, "beta": 4}
    assert complete(client, body=body) == [text]
    flat = {"objective_weights": "brief=0.7,positive=0.3", "beta": 4}
    assert complete(client, body={"vllm_xargs": flat}) == [text]
    assert complete(client, body={**body, "stream_options": None, "tilt_cap": None}) == [text]
    assert complete(client) != [text]


def test_chats_and_streams_are_steered_alike(client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 20,
        "seed": 4,
        "extra_body": {"objective_weights": {"brief": 1}},
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            {"objective_weights": {"bref": 1}},
            "objective_weights: there is no objective 'bref'; available: brief, positive",
        ),
        ({"objective_weights": {"brief": -1}}, "the weight of 'brief' is -1.0; use a finite number >= 0"),
        ({"objective_weights": {"brief": 1}, "beta": -1}, "beta: is -1.0; use a number from 0"),
        ({"objective_weights": {"brief": 1}, "scorer": "qhead"}, "scorer: is 'qhead'; there is no student for brief"),
        (
            {"objective_weights": {"brief": 1}, "ignore_eos": True},
            "ignore_eos: is true; with objective_weights use false",
        ),
        ({"beta": 2}, "beta: has no effect without objective_weights"),
        ({"preferences": [{"text": "Be kind."}]}, "preferences: sentences need further rows of the base model"),
    ],
)
def test_bad_arguments_are_refused_by_name(client, body, problem):
    with pytest.raises(openai.BadRequestError, match=re.escape(problem)):
        complete(client, body=body)


def test_a_server_that_cannot_steer_does_not_start(model, tmp_path):
    log = tmp_path / "log"
    with running(model, log, **{VARIABLE: str(tmp_path / "nothing")}) as process:
        assert not isinstance(process, str)
        assert process.returncode != 0
    lines = [line for line in log.read_text().splitlines() if "steering cannot start" in line]
    assert len(lines) == 1
    assert f"environment variable MAVIS_VALUES: {tmp_path}/nothing is not a finished run" in lines[0]
