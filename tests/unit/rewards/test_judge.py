"""A language model as a judge: ratings from its distribution, and errors that name the endpoint."""

from __future__ import annotations

import socket

import pytest

from mavis_dist import config, rewards
from mavis_dist.rewards import RewardError
from mavis_dist.rewards.judge import Reply
from mavis_dist.sections import Objective
from tests.judge_server import Script, judge_server

CRITERION = "The answer is polite."


def objective(url: str) -> Objective:
    spec = {"reward": "judge", "url": url, "model": "wise", "criterion": CRITERION}
    return config.parse({"run": "r", "storage": "s", "objectives": {"polite": spec}}).objectives["polite"]


def score(script: Script, *pairs: tuple[str, str]) -> tuple[list[float], list[dict[str, object]]]:
    with judge_server(script) as (url, bodies):
        found = rewards.build(objective(url)).score([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    return found, bodies


def test_a_rating_is_the_mean_over_digits() -> None:
    found, [body] = score(lambda _: (" 9", {" 9": 0.4, "9": 0.1, "1": 0.25, "maybe": 0.2}), ("Hello?", "Hi!"))
    assert found == pytest.approx([(0.5 * 9 + 0.25 * 1) / 0.75])
    question = str(body["messages"])
    assert all(text in question for text in ("Hello?", "Hi!", CRITERION))
    assert body["model"] == "wise"


def test_a_rating_is_the_digit_replied_without_log_probabilities() -> None:
    found, _ = score(lambda question: ("I say 7." if "good" in question else "3", None), ("q", "bad"), ("q", "good"))
    assert found == [3.0, 7.0]


def test_an_endpoint_that_refuses_log_probabilities_is_asked_without() -> None:
    refused: list[bool] = []

    def script(question: str) -> tuple[str, None] | tuple[int, str]:
        if not refused:
            refused.append(True)
            return 400, "logprobs are not supported with reasoning models"
        return "5", None

    found, bodies = score(script, ("q", "a"))
    assert found == [5.0]
    assert [body.get("logprobs") for body in bodies] == [True, None]


def test_equal_pairs_are_asked_about_once_and_order_is_kept() -> None:
    pairs = [("q", "two"), ("q", "five"), ("q", "two"), ("other", "two")]
    found, bodies = score(lambda question: ("5" if "five" in question else "2", None), *pairs)
    assert found == [2.0, 5.0, 2.0, 2.0]
    assert len(bodies) == 3


def test_text_with_braces_is_passed_on() -> None:
    _, [body] = score(lambda _: ("5", None), ("What is {x}?", "{0} {answer}"))
    assert "What is {x}?" in str(body["messages"])
    assert "{0} {answer}" in str(body["messages"])


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    _, [body] = score(lambda _: ("5", None), ("q", "a"))
    assert body["key"] == "Bearer secret"


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        (lambda _: ("Lovely!", None), ["'wise'", "'Lovely!'", "digit from 1 to 9"]),
        (lambda _: ("Lovely!", {"Lovely": 1.0}), ["'Lovely!'"]),
        (lambda _: (401, "no such key"), ["no such key", "$OPENAI_API_KEY"]),
        (lambda _: (404, "no model wise"), ["no model wise", "check url, model"]),
        (lambda _: (400, "too long"), ["too long"]),
    ],
)
def test_what_a_judge_cannot_do_is_one_line(script: Script, parts: list[str]) -> None:
    with judge_server(script) as (url, _), pytest.raises(RewardError) as error:
        rewards.build(objective(url)).score(["q"], ["a"])
    assert all(part in str(error.value) for part in [url, *parts]), str(error.value)
    assert "\n" not in str(error.value)


def test_a_judge_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(RewardError, match=r"does not answer \(.*refused.*\): check url"):
            rewards.build(objective(url), retries=0).score(["q"], ["a"])


def test_a_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(config.ConfigError, match=r"objectives\.polite\.url"):
        objective("127.0.0.1:8000")


def test_options_are_looked_for_where_one_was_drawn() -> None:
    reply = Reply("\n 4", ["\n", " 4"], [{"\n": 0.9, "1": 0.1}, {" 4": 0.5, "6": 0.5}])
    assert reply.shares("123456789") == {"4": 0.5, "6": 0.5}
    assert Reply("so", ["so"], [{"so": 0.9, "2": 0.1}]).shares("123456789") == {"2": 1.0}
    assert Reply("so", ["so"], [{"so": 0.9}]).shares("123456789") == {}
