"""The playground in a browser, with a mouse, a keyboard or a phone."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from playwright.sync_api import expect

from serve.gateway.protocol import ApiError
from tests.browser.servers import Script, Written, as_events, scripted_app, served, tiny_engine_app, token

BASE = Written.of(token("Just", -0.4), token(" start", -0.7, 0, {" go": (-1.2, 0.0)}), token(".", -0.1))
STEERED = Written.of(
    token("Start", -0.1, 1.5, {"Just": (-2.4, -2.0)}),
    token(" early", -1.0, -0.8),
    token("!", -0.2, 0.0),
    report={
        "divergence": 3.25,
        "values": {"positive": 0.82, "brief": None},
        "candidates_per_token": 6.5,
        "worded_divergence": 1.25,
        "preferences": [{"text": "Be kind.", "final_weight": 0.7, "mean_weight": 0.6, "mean_reward": -0.125}],
    },
    echo={
        "beta": 6.0,
        "preferences": [{"text": "Be kind.", "weight": 1.0}],
        "preference_params": {"c": 1.93},
    },
)


@pytest.fixture(scope="module")
def tiny_url(tmp_path_factory) -> Iterator[str]:
    """The real API over a tiny engine with two objectives."""
    with tiny_engine_app(tmp_path_factory.mktemp("tiny"), ("positive", "brief")) as app, served(app) as url:
        yield url


@pytest.fixture
def play(open_page):
    """Opens the page of a server that plays a script."""
    with ExitStack() as servers:

        def play(script: Script, **settings):
            page = open_page(servers.enter_context(served(scripted_app(script))), **settings)
            page.script = script
            return page

        yield play


def script(**fields) -> Script:
    return Script(**{"base": BASE, "steered": STEERED, **fields})


def ask(page) -> None:
    page.get_by_role("button", name="Ask both").click()


def answer(page, name: str):
    return page.locator(f"#{name} .text")


def status(page):
    return page.get_by_role("status")


# --- the page -----------------------------------------------------------------------------------------------------


def test_loads_nothing_from_elsewhere_and_logs_no_error(open_page, tiny_url):
    page = open_page(tiny_url)
    # Something steers from the beginning.
    expect(page.get_by_role("slider", name="brief")).to_have_value("1")
    expect(page.get_by_role("slider", name="positive")).to_have_value("0")
    assert sorted(page.urls) == sorted([tiny_url, f"{tiny_url}v1/models", f"{tiny_url}v1/objectives"])
    assert page.complaints == []


def test_every_control_has_a_name_and_ids_are_unique(play):
    page = play(script())
    page.get_by_role("button", name="Add a preference").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select, button")]
            .filter((control) => !control.ariaLabel && !control.labels?.length && !control.textContent.trim())
            .map((control) => control.outerHTML)"""
    )
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert nameless == []
    assert len(ids) == len(set(ids))


def test_input_before_the_objectives_are_loaded_is_kept(open_page, tiny_url):
    page = open_page(tiny_url)
    limit = page.get_by_label("Max. tokens")
    expect(limit).not_to_have_value("64")  # which is the page's own
    held = []
    page.route("**/v1/objectives", lambda route: held.append(route))
    with page.expect_request("**/v1/objectives"):
        page.reload()
    limit.fill("12")
    held[0].continue_()
    expect(page.get_by_role("slider", name="brief")).to_be_visible()
    expect(limit).to_have_value("12")


def test_works_without_objectives(play):
    page = play(script(objectives=()))
    expect(page.get_by_text("This server has no trained objectives.")).to_be_visible()
    expect(page.get_by_label("Preference 1", exact=True)).to_have_value("Answer in as few words as possible.")
    ask(page)
    expect(answer(page, "steered")).to_have_text("Start early!")
    assert page.script.bodies[-1].get("objective_weights") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(play, scheme):
    page = play(script(), color_scheme=scheme)
    ask(page)
    expect(status(page)).to_contain_text("complete")
    is_dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert is_dark == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS, ["body", ".note", ".lead", "#ask", ".token.up", ".token.down", "#base h3"])
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


# WCAG contrast of the text of elements with what is painted behind them.
CONTRASTS = """(selectors) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const contrast = (element) => {
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [low, high] = [light(paint(behind)), light(paint([getComputedStyle(element).color]))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  return Object.fromEntries(selectors.map((name) => [name, contrast(document.querySelector(name))]));
}"""


def test_fits_a_phone(play):
    page = play(script(), viewport={"width": 360, "height": 640}, has_touch=True)
    page.get_by_role("button", name="Add a preference").click()
    ask(page)
    expect(status(page)).to_contain_text("complete")
    page.locator("#steered .token").first.tap()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    for name in ("Ask both", "Stop"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport()


# --- answers ------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_the_api(open_page, tiny_url):
    page = open_page(tiny_url)
    bodies = []
    page.on("request", lambda request: request.post_data and bodies.append(json.loads(request.post_data)))
    page.get_by_label("Max. tokens").fill("40")
    page.get_by_role("button", name="Add a preference").click()
    page.get_by_label("Preference 1", exact=True).fill("Be kind.")
    ask(page)
    expect(status(page)).to_contain_text("Both answers are complete")
    [base] = [body for body in bodies[-2:] if "objective_weights" not in body]
    [steered] = [body for body in bodies[-2:] if "objective_weights" in body]
    assert {**base, **{name: steered[name] for name in ("objective_weights", "preferences")}} == steered
    texts = []
    for name, body in (("base", base), ("steered", steered)):
        events = as_events(httpx.post(f"{tiny_url}v1/chat/completions", json=body, timeout=20).text)
        texts.append("".join(event["choices"][0]["delta"].get("content", "") for event in events))
        assert answer(page, name).text_content() == texts[-1]
    assert texts[0] != texts[1]
    expect(page.locator("#measure-rows")).to_contain_text(re.compile(r"Divergence\d+\.\d\d nats"))
    expect(page.get_by_role("row", name="Be kind.")).to_be_visible()


def test_answers_are_shown_while_they_stream(play):
    page = play(script(base=Written([], ending="endless"), steered=Written([], ending="endless")))
    ask(page)
    for name in ("base", "steered"):
        expect(answer(page, name)).to_contain_text("more more")
        expect(page.locator(f"#{name}")).to_have_attribute("aria-busy", "true")
    expect(status(page)).to_have_text("Generating both answers …")


def test_what_steering_did_is_reported(play):
    page = play(script())
    page.get_by_role("button", name="Add a preference").click()
    page.get_by_label("Preference 1", exact=True).fill("Be kind.")
    ask(page)
    expect(status(page)).to_have_text("Both answers are complete; 3.25 nats apart.")
    measures = page.get_by_role("region", name="What steering did")
    expect(measures).to_contain_text("Divergence3.25 nats")
    expect(measures).to_contain_text("of which 1.25 nats by preferences")
    expect(measures).to_contain_text("positive+0.82 sd")
    expect(measures).to_contain_text("briefnot known")
    row = measures.get_by_role("row", name="Be kind.")
    assert row.get_by_role("cell").all_text_contents() == ["1.00", "0.60", "0.70", "−0.13"]
    expect(page.locator("#steered footer")).to_have_text("3 tokens, ended by itself")
    expect(page.get_by_role("spinbutton", name="of trained objectives")).to_have_attribute("placeholder", "6")
    page.get_by_text("All tokens of the steered answer as a table").click()
    expect(measures.get_by_role("row", name="Start")).to_contain_text("+1.50")


def test_tokens_are_coloured_by_how_far_guidance_moved_them(play):
    page = play(script())
    ask(page)
    expect(status(page)).to_contain_text("complete")
    marks = page.locator("#steered .token")
    assert marks.evaluate_all("(spans) => spans.map((span) => span.className)") == ["token up", "token down", "token"]
    assert marks.evaluate_all("(spans) => spans.map((span) => +span.style.getPropertyValue('--m'))")[:2] == [0.75, 0.4]
    expect(page.locator("#base .up, #base .down")).to_have_count(0)


def test_candidates_show_on_hover_and_focus(play):
    page = play(script())
    ask(page)
    expect(status(page)).to_contain_text("complete")
    tip = page.get_by_role("tooltip")
    start = page.locator("#steered .token").first
    start.hover()
    expect(tip).to_contain_text("Start: guidance made it 4.48 times likelier (+1.50 nats); this step spent 0.38 nats")
    assert tip.get_by_role("row").all_text_contents() == ["candidatebasesteered", "Start ✓20 %90 %", "Just67 %9.1 %"]
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    start.focus()
    expect(start).to_have_attribute("aria-describedby", "tip")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#steered .token").nth(1)).to_be_focused()
    expect(tip).to_contain_text("␣early: guidance made it 2.23 times less likely (−0.80 nats)")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.locator("#base .token").nth(1).hover()
    assert tip.get_by_role("row").all_text_contents() == ["candidateprobability", "␣start ✓50 %", "␣go30 %"]


def test_unknown_values_are_shown_as_unknown(play):
    unknown = {**token("So"), "logprob": None, "top_logprobs": [], "mavis": {"logratio": None, "divergence": None}}
    report = {"divergence": None, "values": {"positive": None}, "candidates_per_token": 0.0}
    page = play(script(steered=Written.of(unknown, report=report)))
    ask(page)
    expect(status(page)).to_have_text("Both answers are complete.")
    expect(page.locator("#measure-rows")).to_contain_text("Divergencenot known")
    page.locator("#steered .token").focus()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text("So: how far guidance moved it is not known")
    assert tip.get_by_role("row").all_text_contents()[1:] == ["So ✓––"]


def test_text_is_whole_however_tokens_cut_it(play):
    smile = "😀".encode()
    pieces = [
        ("caf", [token("caf")]),
        ("é ", [token(b"\xc3"), token(b"\xa9"), token(" ")]),
        ("😀", [token(smile[:2]), token(smile[2:])]),
        (" cut by a st", [token(" cut"), token(" by"), token(" a stop")]),
        ("<i>not markup</i>", []),
    ]
    page = play(script(steered=Written(pieces)))
    ask(page)
    expect(answer(page, "steered")).to_have_text("café 😀 cut by a st<i>not markup</i>")
    texts = page.locator("#steered .token").all_text_contents()
    assert texts == ["caf", "é", " ", "😀", " cut", " by", " a st"]


def test_a_server_without_token_data_is_asked_again_without(play):
    page = play(script(has_token_data=False))
    ask(page)
    expect(answer(page, "base")).to_have_text("Just start.")
    expect(answer(page, "steered")).to_have_text("Start early!")
    expect(page.get_by_text("no data about single tokens")).to_be_visible()
    assert ["logprobs" in body for body in page.script.bodies] == [True, True, False, False]
    ask(page)
    expect(status(page)).to_contain_text("complete")
    assert len(page.script.bodies) == 6
    assert not any("logprobs" in body for body in page.script.bodies[4:])
    expect(page.locator("#curl")).not_to_contain_text("logprobs")


def test_an_empty_seed_is_drawn_once_for_both(play):
    page = play(script())
    page.get_by_label("Seed").fill("")
    ask(page)
    expect(status(page)).to_contain_text("complete")
    base, steered = page.script.bodies
    assert base["seed"] == steered["seed"]
    expect(page.locator("#curl")).to_contain_text(f'"seed": {base["seed"]}')


def test_weights_of_zero_steer_nothing(play):
    page = play(script())
    page.get_by_role("slider", name="positive").fill("0")
    expect(page.get_by_text("nothing steers")).to_be_visible()
    ask(page)
    expect(answer(page, "steered")).to_have_text("Just start.")
    assert page.script.bodies[0] == page.script.bodies[1]


# --- trouble ------------------------------------------------------------------------------------------------------


def test_a_refusal_is_shown_and_its_field_is_marked(open_page, tiny_url):
    page = open_page(tiny_url)
    page.get_by_label("Max. tokens").fill("5000")
    ask(page)
    problem = page.get_by_role("alert")
    expect(problem).to_have_text("Both answers: max_tokens is 5000; this server generates at most 400 tokens")
    expect(page.get_by_label("Max. tokens")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Max. tokens").fill("5")
    ask(page)
    expect(status(page)).to_contain_text("Both answers are complete")
    expect(problem).to_be_empty()
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"steered": Written.of(token("So"), ending="error")},
            "Steered answer: the engine <b>failed</b>",
        ),
        (
            {"steered": Written.of(token("So"), ending="cut")},
            "Steered answer: The connection broke before the answer was complete.",
        ),
        (
            {"refusal": ApiError(429, "too many requests.", code="overloaded")},
            "Steered answer: too many requests. Try again in 7 s.",
        ),
    ],
)
def test_an_answer_that_fails_does_not_hide_the_other(play, fields, message):
    page = play(script(**fields))
    ask(page)
    expect(page.get_by_role("alert")).to_have_text(message)
    expect(answer(page, "base")).to_have_text("Just start.")
    expect(status(page)).to_have_text("One answer is complete.")
    expect(page.locator("#steered footer")).to_contain_text("not complete")
    expect(page.locator("#steered")).to_have_attribute("aria-busy", "false")


def test_a_key_is_asked_for_sent_and_kept_out_of_the_code(play):
    page = play(script(key="secret-1"))
    expect(page.get_by_role("alert")).to_have_text("Server: this server asks for an API key")
    page.get_by_label("API key").fill("secret-1")
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_role("slider", name="positive")).to_be_visible()
    ask(page)
    expect(answer(page, "steered")).to_have_text("Start early!")
    code = page.locator("#curl").text_content() + page.locator("#python").text_content()
    assert "secret-1" not in code
    assert code.count("API_KEY") == 2
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_stop_ends_both_streams(play):
    page = play(script(base=Written([], ending="endless"), steered=Written([], ending="endless")))
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    ask(page)
    expect(answer(page, "steered")).to_contain_text("more more")
    stop.click()
    expect(status(page)).to_have_text("Stopped.")
    expect(stop).to_be_disabled()
    expect(page.get_by_role("button", name="Ask both")).to_be_focused()
    deadline = time.monotonic() + 30  # the browser may be slow beside other tests
    while page.script.num_broken_off < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert page.script.num_broken_off == 2
    written = answer(page, "steered").text_content()
    page.wait_for_timeout(100)
    assert answer(page, "steered").text_content() == written
    assert page.complaints == []


# --- code and keyboard --------------------------------------------------------------------------------------------


def test_the_code_is_the_request_that_was_sent(play):
    page = play(script())
    page.get_by_label("Question").fill('What\'s "new"?\nAnd $HOME, `x`, \\n, é 😀?')
    page.get_by_text("System text").click()
    page.get_by_label("System text").fill("Don't lie.")
    page.get_by_role("button", name="Add a preference").click()
    page.get_by_label("Preference 1", exact=True).fill("Be kind, isn't it?")
    page.get_by_label("Weight of preference 1").fill("0.4")
    page.get_by_role("button", name="Add a preference").click()  # stays empty: not meant yet
    page.get_by_role("slider", name="brief").fill("0.25")
    page.get_by_role("spinbutton", name="of trained objectives").fill("4.5")
    page.get_by_role("slider", name="Strength of preferences, slider").fill("1.5")
    page.get_by_label("Temperature").fill("0.7")
    before = page.locator("#curl").text_content()
    ask(page)
    expect(status(page)).to_contain_text("complete")
    [sent] = [body for body in page.script.bodies if "preferences" in body]
    assert sent["preferences"] == [{"text": "Be kind, isn't it?", "weight": 0.4}]
    assert sent["objective_weights"] == {"positive": 1, "brief": 0.25}
    assert (sent["beta"], sent["preference_params"], sent["temperature"]) == (4.5, {"c": 1.5}, 0.7)
    assert page.locator("#curl").text_content() == before
    assert body_of_curl(before, page.url) == sent
    assert body_of_python(page.locator("#python").text_content(), page.url) == sent


def body_of_curl(command: str, url: str) -> dict:
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (program, arguments[:2]) == ("curl", ["--no-buffer", f"{url}v1/chat/completions"])
    assert arguments[2:4] == ["-H", "content-type: application/json"]
    return json.loads(arguments[arguments.index("-d") + 1])


def body_of_python(program: str, url: str) -> dict:
    """The request of the program, recorded by a fake client."""
    sent = {}

    class Client:
        def __init__(self, base_url: str, api_key: str):
            assert base_url == f"{url}v1"
            self.chat = self.completions = self

        def create(self, extra_body: dict, **fields):
            sent.update(fields, **extra_body)
            return []

    ast.parse(program)
    known = sys.modules.get("openai")
    sys.modules["openai"] = types.SimpleNamespace(OpenAI=Client)  # type: ignore[assignment]
    try:
        exec(program, {})
    finally:
        if known is None:
            del sys.modules["openai"]
        else:
            sys.modules["openai"] = known
    return sent


def test_copy_puts_the_code_on_the_clipboard(play):
    page = play(script(), permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#curl")).to_contain_text("played")
    page.get_by_role("button", name="Copy the Python program").click()
    expect(status(page)).to_have_text("Copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == page.locator("#python").text_content()


def test_all_controls_work_with_the_keyboard(play):
    page = play(script())
    expect(page.get_by_role("slider", name="positive")).to_be_visible()

    def tab_to(target) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if target.evaluate("(element) => element === document.activeElement"):
                return
        raise AssertionError(f"the tab key does not lead to {target}")

    tab_to(page.get_by_label("Question"))
    page.keyboard.press("Control+A")
    page.keyboard.type("Why?")
    tab_to(page.get_by_role("slider", name="brief"))
    page.keyboard.press("End")
    tab_to(page.get_by_role("button", name="Add a preference"))
    page.keyboard.press("Enter")
    expect(page.get_by_label("Preference 1", exact=True)).to_be_focused()
    page.keyboard.type("Be kind.")
    tab_to(page.get_by_role("button", name="Remove preference 1"))
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Add a preference")).to_be_focused()
    tab_to(page.get_by_role("button", name="Ask both"))
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("complete")
    expect(page.get_by_role("button", name="Ask both")).to_be_focused()
    assert page.script.bodies[1]["objective_weights"] == {"positive": 1, "brief": 1}
    assert "preferences" not in page.script.bodies[1]
    # An answer is one stop, however many tokens it has.
    tab_to(page.locator("#base .token").first)
    page.keyboard.press("End")
    expect(page.locator("#base .token").last).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#steered .token").first).to_be_focused()
    expect(page.get_by_role("tooltip")).to_be_visible()
    page.get_by_label("Question").focus()
    page.keyboard.press("Control+Enter")
    expect(status(page)).to_contain_text("complete")
    assert len(page.script.bodies) == 4
