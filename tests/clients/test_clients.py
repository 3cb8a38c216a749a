"""Clients of others, each in a process and an environment of its own (`make test-clients`), against real HTTP.

They get the answers that the official client for Python gets.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.local import NAME, LocalService, listening
from tests.root import ROOT

CLIENTS = ROOT / ".clients"
HERE = Path(__file__).parent
ASKED: dict[str, Any] = {"model": NAME, "max_tokens": 8, "seed": 7}
STEERING = {"objective_weights": {"brief": 1.0}}
HELLO: Any = [{"role": "user", "content": "Hello there"}]

pytestmark = pytest.mark.skipif(not CLIENTS.exists(), reason="make test-clients installs them")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = LocalService(tmp_path_factory.mktemp("local"))
    with listening(service.app()) as url:
        yield f"{url}/v1"
    service.loop.stop()


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(client) -> dict[str, Any]:
    chat = client.chat.completions.create(**ASKED, messages=HELLO, extra_body=STEERING)
    batch = client.completions.create(**ASKED, prompt=["Once upon", "The sky is"], extra_body=STEERING)
    texts = [choice.text for choice in batch.choices]
    content = chat.choices[0].message.content
    return {
        "chat": content,
        "chat streamed": content,
        "chat batch": [content] * 2,
        "chat tokens": 8,
        "text": texts[0],
        "text streamed": texts[0],
        "text batch": texts,
        "models": [NAME],
        "model": NAME,
        "refused": [400, "objective_weights"],
    }


def output(*command: str | Path, **variables: str) -> str:
    """What a client writes; it sees no module of this project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "none",
        "CLIENTS": str(CLIENTS),
        **variables,
    }
    done = subprocess.run(command, env=environment, cwd=CLIENTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["langchain_client.py", "litellm_client.py", "node_client.mjs"])
def test_a_client_gets_the_same_answers(url, expected, name):
    program = "node" if name.endswith(".mjs") else CLIENTS / "bin" / "python"
    told = json.loads(output(program, HERE / name, url, NAME).splitlines()[-1])
    assert len(told) >= 5
    assert told == {what: expected[what] for what in told}


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_the_command_llm(url, client, tmp_path, options):
    models = [
        {"model_id": "chat", "model_name": NAME, "api_base": url},
        {"model_id": "text", "model_name": NAME, "api_base": url, "completion": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    chat = client.chat.completions.create(**ASKED, messages=HELLO).choices[0].message.content
    text = client.completions.create(**ASKED, prompt="Once upon").choices[0].text
    for model, prompt, answer in (("chat", "Hello there", chat), ("text", "Once upon", text)):
        llm = (CLIENTS / "bin" / "llm", "-m", model, prompt, "-o", "max_tokens", "8", "-o", "seed", "7", *options)
        assert output(*llm, LLM_USER_PATH=str(tmp_path)).strip() == answer.strip()
