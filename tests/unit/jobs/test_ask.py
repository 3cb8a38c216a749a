"""A question in the terminal: answered by a service or a run, streamed, compared, and refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from jobs import ask, backends
from jobs.backends import Asked, Backend, Report, Write
from mavis_dist import LLM, Answer
from mavis_dist.types import UserError
from serve.gateway import api_keys
from serve.gateway.api_keys import Keys
from tests.local import listening
from tests.root import ROOT
from tests.tiny import LONGEST_ANSWER

QUESTION = "How do I make good coffee?"
STEERED = [QUESTION, "--weights", "positive=0.7,brief=0.3", "--seed", "1"]
WEIGHTS = {"positive": 0.7, "brief": 0.3}
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def llm(finished_run: Path) -> LLM:
    return LLM.from_run(finished_run)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No service, no run and no key of this machine."""
    monkeypatch.setattr(backends, "URL", CLOSED)
    monkeypatch.setattr(backends, "RUN", str(tmp_path / "nowhere"))
    monkeypatch.delenv("MAVIS_API_KEY", raising=False)


def chat(llm: LLM, *question, **options) -> Answer:
    """As long as jobs.ask lets it be by default."""
    return llm.chat(*question, **{"max_tokens": LONGEST_ANSWER, **options})


def refused(capsys, *argv: str) -> str:
    """The one line of a refusal, without anything on stdout."""
    with pytest.raises(SystemExit) as caught:
        ask.main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["service", "run"])
def place(request, finished_run, run_url) -> list[str]:
    return ["--url", f"{run_url}/v1/"] if request.param == "service" else ["--run", str(finished_run)]


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        (["--weights", "positive=0.7, brief=0.3"], {"weights": WEIGHTS}),
        (["--weights", "brief=1", "--temperature", "0", "--beta", "1.5"], {"weights": {"brief": 1}, "beta": 1.5}),
        (["--prefer", "Be odd.", "--prefer", "Be kind."], {"preferences": ["Be odd.", "Be kind."]}),
        (
            ["--prefer", "Be odd.", "--prefer", "Be kind.", "--prefer-weights", "2,0.5", "--system", "Be bad."],
            {"preferences": {"Be odd.": 2, "Be kind.": 0.5}, "system": "Be bad."},
        ),
        (["--max-tokens", "5"], {"max_tokens": 5}),
    ],
)
def test_stdout_has_the_answer_of_service_and_run(capsys, place, llm, argv, options):
    ask.main([QUESTION, *place, "--seed", "1", *argv])
    out, err = capsys.readouterr()
    expected = chat(llm, QUESTION, seed=1, temperature=0.0 if "--temperature" in argv else 1.0, **options)
    assert out == f"{expected.text}\n"
    assert err.endswith("seed 1]\n")


def test_the_report_says_what_steering_cost_and_brought(capsys, place, llm):
    ask.main([*STEERED, *place])
    answer = chat(llm, QUESTION, WEIGHTS, seed=1)
    shown = {name: answer.values[name] for name in WEIGHTS}
    values = ", ".join(f"{name} {value:+.2f} sd" for name, value in shown.items())
    cost = f"steering cost {answer.divergence:.1f} nats"
    assert capsys.readouterr().err == f"[{cost}; predicted reward: {values}; seed 1]\n"
    ask.main([*STEERED, *place, "--temperature", "0"])
    assert "steering cost unknown" in capsys.readouterr().err


def test_compared_answers_have_one_seed(capsys, place, llm):
    ask.main([QUESTION, "--weights", "positive=0.7,brief=0.3", "--prefer", "Be odd.", "--compare", *place])
    out, err = capsys.readouterr()
    assert err == ""
    seed = int(re.search(r"seed (\d+)\]\n$", out)[1])
    base = chat(llm, QUESTION, seed=seed)
    steered = chat(llm, QUESTION, WEIGHTS, preferences="Be odd.", seed=seed)
    head = 'steered (positive 0.7, brief 0.3, "Be odd." 1)'
    blocks = f"base\n----\n{base.text}\n\n{head}\n{'-' * len(head)}\n{steered.text}\n\n[steering cost "
    assert out.startswith(blocks)
    assert out[len(blocks) :].count("\n") == 1


def test_pieces_are_shown_as_they_come(place):
    pieces: list[str] = []
    backend = backends.choose(*({"--url": (place[1], None), "--run": (None, place[1])}[place[0]]))
    backend.ask(Asked(QUESTION, 1, WEIGHTS, {}), pieces.append)
    assert len(pieces) > 1


def test_without_a_place_the_service_answers_and_without_a_service_the_run(
    capsys, monkeypatch, finished_run, run_url, llm
):
    expected = chat(llm, QUESTION, WEIGHTS, seed=1).text
    monkeypatch.setattr(backends, "RUN", str(finished_run))
    ask.main(STEERED)
    out, err = capsys.readouterr()
    assert out == f"{expected}\n"
    assert err.startswith(f"no service answers at {CLOSED}: loading {finished_run}\n")
    monkeypatch.setattr(backends, "URL", run_url)
    monkeypatch.setattr(backends, "local", None)
    ask.main(STEERED)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_question_may_come_through_a_pipe(capsys, monkeypatch, run_url, llm):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    ask.main([*STEERED[1:], "--url", run_url])
    assert capsys.readouterr().out == f"{chat(llm, QUESTION, WEIGHTS, seed=1).text}\n"


def test_questions_may_be_typed_one_after_another(capsys, monkeypatch, run_url, llm):
    lines = iter(["", QUESTION, "x" * 2000, "Why?"])

    def typed(prompt: str) -> str:
        assert prompt == "question> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    ask.main([*STEERED[1:], "--url", run_url])
    out, err = capsys.readouterr()
    assert out == "".join(f"{chat(llm, question, WEIGHTS, seed=1).text}\n" for question in (QUESTION, "Why?")) + "\n"
    assert "error: messages: has" in err


def test_what_a_model_generates_does_not_steer_the_terminal(capsys):
    def backend(asked: Asked, write: Write) -> Report:
        write("a\x1b[2Jb\n\tc\x07\x85é\u200d")
        return Report(None, {})

    ask.answer(Backend({}, backend), Asked("?", 1, {}, {}))
    assert capsys.readouterr().out == "a[2Jb\n\tcé\u200d\n"


# --- refusals and ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["?", "--weights", "positive"], r"--weights: 'positive' is not name=weight"),
        (["?", "--weights", "a=1,b=x"], r"--weights: 'b=x' is not"),
        (["?", "--prefer", "A", "--prefer-weights", "1,2"], "--prefer-weights: 2 given for 1 --prefer"),
        (["?", "--prefer", "A", "--prefer-weights", "x"], "--prefer-weights: 'x' is not a finite number"),
        (["?", "--weights", "a=-1"], "--weights: the weight of 'a' is -1"),
        (["?", "--prefer", " "], "--prefer: a text is empty"),
        (["?", "--prefer", "A", "--prefer", "B", "--prefer-weights", "1,-1"], "--prefer-weights: 1,-1 given"),
        (["?", "--prefer", "A", "--prefer-weights", "0"], "--prefer-weights: 0 given"),
        (["?", "--prefer", "A", "--prefer", "A"], "--prefer: a text is given twice"),
        (["?", "--compare"], "--compare needs something that steers"),
        ([" "], "there is no question"),
        (["\udc80"], "the question is not valid UTF-8"),
        (["?"], f"no service answers at {CLOSED} and there is no finished run in .*make serve.*make quickstart"),
        (["?", "--url", CLOSED], f"the service at {CLOSED} does not answer"),
        (["?", "--url", "127.0.0.1:9"], "the service at 127.0.0.1:9 does not answer"),
        (["?", "--url", "http://["], "does not answer"),
        (["?", "--run", "/nowhere/at/all"], r"/nowhere/at/all is not a finished run, it has no run\.yaml"),
        (["?", "--run", "nosuch://a/b"], "storage 'nosuch://a' cannot be opened"),
        (["?", "--url", CLOSED, "--key", "é"], "the API key holds characters"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(capsys, argv, message):
    assert re.search(message, refused(capsys, *argv))


@pytest.mark.parametrize(
    "argv",
    [["--url", CLOSED, "--run", "runs/x"], ["--beta", "nan"], ["--seed", "x"], ["--temperature", "hot"]],
)
def test_options_that_cannot_be_read_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        ask.main(["?", *argv])
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_objective_is_refused_with_the_known_ones(capsys, place):
    unknown = refused(capsys, "?", "--weights", "fame=1", "--compare", *place)
    assert "no objective 'fame'; available: brief, positive" in unknown
    assert "max_tokens" in refused(capsys, "?", "--max-tokens", "0", *place)


def test_an_empty_pipe_is_no_question(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "there is no question" in refused(capsys)


def test_a_service_asks_for_its_key_and_nobody_sees_it(capsys, monkeypatch, tmp_path, service):
    key = api_keys.add(tmp_path / "keys.json", "ann")
    with listening(service.app(Keys(tmp_path / "keys.json"))) as url:
        argv = ["?", "--url", url, "--max-tokens", "2"]
        monkeypatch.setattr(backends, "URL", url)
        for asked in (argv, ["?"]):
            assert "give --key or set MAVIS_API_KEY" in refused(capsys, *asked)
        assert "wrong" not in refused(capsys, *argv, "--key", "wrong")
        monkeypatch.setenv("MAVIS_API_KEY", key)
        ask.main(argv)
        assert key not in "".join(capsys.readouterr())


def test_what_is_not_a_service_of_ours_is_refused(capsys):
    app = FastAPI()
    with listening(app) as url:
        assert f"the service answers with status 404 ({url})" in refused(capsys, "?", "--url", url)
        app.get("/health")(lambda: {"status": "fine"})
        assert f"{url} is not a service of mavis_dist" in refused(capsys, "?", "--url", url)


@pytest.mark.parametrize("end", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupt_and_a_closed_pipe_end_it_quietly(capfd, monkeypatch, end):
    def backend(asked: Asked, write: Write) -> Report:
        raise end

    monkeypatch.setattr(backends, "choose", lambda *_: Backend({}, backend))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        ask.main(["?"])
    assert caught.value.code == {KeyboardInterrupt: 130, BrokenPipeError: 141}[end]
    assert capfd.readouterr().err.strip() == ""


def test_whoever_reads_a_pipe_may_leave(run_url):
    command = [sys.executable, "-m", "jobs.ask", QUESTION, "--url", run_url, "--weights", "brief=1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == ask.PIPE_CLOSED


# --- events ----------------------------------------------------------------------------------------------------------


def sent(*texts: str) -> bytes:
    """As the gateway writes them."""
    lines = [json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False) for text in texts]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_events_are_read_in_whatever_chunks_they_come(size):
    texts = ["a", "é\u2028b", "\x85c\n"]
    data = sent(*texts)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    read = [event["choices"][0]["delta"]["content"] for event in backends.events(chunks)]
    assert read == texts


def test_a_stream_that_is_cut_or_fails_is_an_error():
    with pytest.raises(UserError, match="before it was complete"):
        list(backends.events([sent("a").removesuffix(b"data: [DONE]\n\n")]))
    with pytest.raises(UserError, match="too late"):
        backends._follow([{"error": {"message": "too late"}}], print)
