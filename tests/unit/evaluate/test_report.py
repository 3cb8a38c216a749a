"""The report: one page with every number, all text escaped, nothing loaded, and the same bytes for the same input."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import matplotlib
import pytest

from mavis_dist.config import parse
from mavis_dist.evaluate import collect
from mavis_dist.evaluate.metadata import ModelMetadata, StageMetadata
from mavis_dist.evaluate.plots import smooth
from mavis_dist.evaluate.report import render
from mavis_dist.evaluate.sweep import Estimate, Limit, PointResult, Sweep, grid
from mavis_dist.evaluate.words import duration
from mavis_dist.store import layout
from mavis_dist.store.files import Store

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)> & \"quoted\" {{ 7 * 7 }} \u202e"
NAMES = ["positive", "brief", "relevant"]
VOID = {"meta", "br", "img", "link", "input", "hr"}


def make_sweep(num_objectives, steps=3):
    names = NAMES[:num_objectives]
    points = []
    for index, point in enumerate(grid(names, steps)):
        gain, reward = {}, {}
        for order, name in enumerate(names):
            mean = 0.37 * index - 0.51 * order if point.weights else 0.0
            half = 0.11 + 0.01 * index if point.weights else 0.0
            gain[name] = Estimate(mean, mean - half, mean + half)
            reward[name] = Estimate(mean + 0.07, mean - 0.13, mean + 0.29)
        points.append(
            PointResult(point.name, dict(point.weights), reward, gain, 1.13 * index, 40.0 + index)  # nats, tokens
        )
    answers = {point.name: f"an answer by {point.name}" for point in points}
    examples = [{"prompt": f"question number {index}?", "answers": answers} for index in range(9)]
    return Sweep(points, 1.375, 9, 2.0, examples)


def make_models(num_objectives):
    losses = [1.0 / (1 + step) + 0.2 for step in range(30)]
    return [
        ModelMetadata(
            name,
            iteration,
            0.25 + 0.1 * iteration,
            losses,
            f"reward of {name}",
            r2_ceiling=0.75 + 0.01 * iteration,
            slopes={1: Estimate(1.41, 0.63, 2.17), 4: Estimate(0.83 + iteration, -0.21, 1.92)},
            correlations={1: Estimate(0.13, 0.04, 0.22), 4: Estimate(-0.31, -0.42, 0.08)},
        )
        for name in NAMES[:num_objectives]
        for iteration in (0, 1)
    ]


STAGES = [
    StageMetadata("growing trees", 754.0, "96 trees"),
    StageMetadata("training", None, "finished before"),
]
SETTINGS = {"steer.beta": 2.0, "base.model": "toy", "steer.tilt_cap": None, "rollout.shape": [4, 2]}


@cache
def make_page(num_objectives=2):
    return render("demo", make_sweep(num_objectives), make_models(num_objectives), STAGES, SETTINGS)


class Page(HTMLParser):
    """What a browser would see: elements, attributes and text outside of style sheets."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.pieces, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


def shown(value, digits=2):
    return f"{value:+.{digits}f}".replace("-", "−")


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_every_number_of_every_point_is_on_the_page_as_text(num_objectives):
    sweep = make_sweep(num_objectives)
    page = Page(make_page(num_objectives))
    for point in sweep.points:
        assert point.name in page.text
        assert f" {point.divergence:.2f} {point.num_tokens:.1f} " in page.text.replace("  ", " ")
        for estimate in [*point.gain.values(), *point.reward.values()]:
            low, high = shown(estimate.low), shown(estimate.high)
            assert f"{shown(estimate.mean)} [{low}, {high}]" in page.text


@pytest.mark.parametrize(("num_objectives", "num_plots"), [(1, 2 + 1), (2, 2 + 2), (3, 4 + 3)])
def test_plots_are_complete_well_nested_and_described(num_objectives, num_plots):
    page = Page(make_page(num_objectives))
    assert page.open == []
    assert page.elements.count("svg") == page.elements.count("figure") == num_plots
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    described = [words for words in pictures if words.startswith(("Scatter plot", "Bars", "Training loss"))]
    assert len(described) == num_plots
    assert page.values("role").count("img") == num_plots
    for point in make_sweep(num_objectives).points:
        assert any(point.name in words for words in described)


def test_ids_are_unique_and_every_reference_has_its_target():
    page = make_page(3)
    ids = Page(page).values("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', page)) <= set(ids)


def test_colours_of_plots_follow_the_theme():
    page = make_page(3)
    plots = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert not re.findall(r"(?:fill|stroke): ?#(?!000000)", plots)
    used = set(re.findall(r"var\((--\w+)", page))
    themes = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(themes) == 2
    for theme in themes:
        assert used - {"--c"} <= set(re.findall(r"(--\w+):", theme))


def test_untrusted_text_is_escaped():
    sweep = make_sweep(2)
    points = [replace(point, name=point.name + HOSTILE) for point in sweep.points]
    examples = [{"prompt": HOSTILE, "answers": {point.name: HOSTILE for point in points}}]
    model = ModelMetadata("positive", 0, None, [1.0, 0.5], HOSTILE)
    page = render(
        HOSTILE,
        replace(sweep, points=points, examples=examples),
        [model],
        [StageMetadata(HOSTILE, 1.0, HOSTILE)],
        {HOSTILE: HOSTILE},
    )
    seen = Page(page)
    assert "script" not in seen.elements
    assert "img" not in seen.elements
    assert not [value for _, name, value in seen.attributes if name.startswith("on")]
    assert seen.text.count(" ".join(HOSTILE.split())) > 10  # shown as written, braces included


def test_objective_names_are_escaped_inside_plots():
    name = "<script>$x^2$</script>"
    zero = Estimate(0.0, 0.0, 0.0)
    one = Estimate(1.0, 0.5, 1.5)
    points = [
        PointResult("base", {}, {name: zero}, {name: zero}, 0.0, 4.0),
        PointResult(name, {name: 1.0}, {name: one}, {name: one}, 1.0, 4.0),
    ]
    seen = Page(render("demo", Sweep(points, 1.0, 1, 1.0, []), [ModelMetadata(name, 0, None, [1.0], "")], [], {}))
    assert "script" not in seen.elements
    assert f"gain in {name}, sd" in seen.pieces


def test_examples_show_base_and_corners_on_the_first_prompts():
    page = Page(make_page(2))
    assert "question number 5?" in page.text
    assert "question number 6?" not in page.text
    assert page.text.count("an answer by base") == page.text.count("an answer by brief") == 6
    assert "an answer by 0.5" not in page.text


def test_nothing_is_loaded():
    page = make_page(3)
    seen = Page(page)
    assert not {"link", "script", "img", "iframe", "object", "embed", "base", "form"} & set(seen.elements)
    assert not seen.values("src")
    assert all(value.startswith("#") for value in seen.values("href") + seen.values("xlink:href"))
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert "default-src 'none'" in seen.values("content")[0]


def test_a_sweep_without_the_rest_is_enough():
    sweep = replace(make_sweep(2), examples=[])
    page = Page(render("demo", sweep, [], [], {}))
    assert page.elements.count("svg") == 2
    assert set(page.values("href")) >= {"#weights"}
    assert not {"#answers", "#models", "#time", "#settings"} & set(page.values("href"))


def test_value_models_show_r2_its_ceiling_and_the_sibling_test():
    text = Page(make_page(2)).text
    for model in make_models(2):
        assert f" {model.r2:.2f} {model.r2_ceiling:.2f} " in text
        for figures in (model.slopes, model.correlations):
            cells = (f"{n}: {shown(e.mean)} [{shown(e.low)}, {shown(e.high)}]" for n, e in figures.items())
            assert " ".join(cells) in text


def test_figures_of_a_value_model_come_from_its_stored_metadata(tmp_path):
    """Those of the sibling test where there are any."""
    store = Store(str(tmp_path), "run")
    config = parse({"run": "run", "objectives": {"positive": {"reward": "sentiment"}}})
    slope = {"sibling_slope/tokens_1": 0.5, "sibling_slope/tokens_1_low": 0.25, "sibling_slope/tokens_1_high": 0.75}
    for iteration, facts in enumerate([{"explained_variance": 0.5, "r2_ceiling": 0.75, **slope}, {}]):
        folder = layout.value_folder("positive", iteration)
        store.write_bytes(f"{folder}/{layout.METRICS_FILE}", b'{"step": 1, "loss": 2.0}\n{"step": 1, "r2": 0}\n')
        store.finish(folder, facts)
    found = [collect.model_metadata(store, config, "positive", iteration) for iteration in range(2)]
    assert found[0] == ModelMetadata(
        "positive", 0, 0.5, [2.0], "sentiment", r2_ceiling=0.75, slopes={1: Estimate(0.5, 0.25, 0.75)}
    )
    assert found[1] == ModelMetadata("positive", 1, None, [2.0], "sentiment")


def test_missing_measurements_are_named():
    models = [ModelMetadata("positive", 0, None, [], "sentiment"), ModelMetadata("brief", 0, None, [0.5], "brevity")]
    models[1] = replace(models[1], gate="refused, iteration 0 stays")
    page = Page(render("demo", make_sweep(2), models, STAGES, SETTINGS))
    assert page.text.count("not measured") == 2
    assert "iteration 0, no validation" in page.text
    assert "refused, iteration 0 stays" in page.text
    assert "training – finished before" in page.text
    assert "12 min 34 s" in page.text
    assert "nan" not in page.text.lower()


def test_greedy_answers_have_no_divergence_to_plot():
    sweep = make_sweep(2)
    greedy = replace(sweep, points=[replace(point, divergence=float("nan")) for point in sweep.points])
    page = Page(render("demo", greedy, [], [], {}))
    assert page.elements.count("svg") == 1
    assert "Gain per nat" not in page.text
    assert "nan" not in page.text.lower()


def with_limits(sweep):
    """Shares of all steered points but the last, and a limit per objective."""
    shares = [Estimate(-0.31, -0.73, 0.12), Estimate(0.62, float("-inf"), float("inf"))]
    points = [replace(point, share=share) for point, share in zip(sweep.points[1:], shares, strict=False)]
    limits = {name: Limit([0.0, 1.0, 2.25], [0.0, 1.1, 1.61]) for name in sweep.points[0].gain}
    return replace(
        sweep, points=[sweep.points[0], *points, *sweep.points[1 + len(points) :]], limits=limits, limit_answers=64
    )


def test_limits_are_drawn_dashed_in_the_colour_of_their_objective_and_shares_are_listed():
    plain = render("demo", make_sweep(2), [], [], {})
    page = render("demo", with_limits(make_sweep(2)), [], [], {})
    assert "limit" not in Page(plain).text.lower()
    assert "share of limit" in Page(page).text
    assert " −0.31 [−0.73, 0.12] " in Page(page).text
    assert " 0.62 " in Page(page).text
    assert "inf" not in re.sub("information", "", Page(page).text)
    assert "share of limit: known from 0.05 to 3.16 nats with evaluate.limit_answers=64." in Page(page).text
    assert any("Limit of brief: +1.61 at 2.25 nats" in words for words in Page(page).values("aria-label"))
    for colour in ("--s0", "--s1"):
        dashed = re.findall(rf'style="fill: none; stroke-dasharray: [^"]*stroke: var\({colour}\)', page)
        assert len(dashed) == 1
        assert not re.findall(rf'style="fill: none; stroke-dasharray: [^"]*stroke: var\({colour}\)', plain)


def test_an_interval_may_miss_its_mean():
    """Bootstrap bounds of equal values can differ from their mean in the last bit."""
    sweep = make_sweep(1)
    odd = Estimate(0.1, 0.1 + 1e-12, 0.1 + 1e-12)
    points = [replace(point, gain={"positive": odd}, reward={"positive": odd}) for point in sweep.points]
    assert "+0.10 [+0.10, +0.10]" in Page(render("demo", replace(sweep, points=points), [], [], {})).text


def test_same_input_same_bytes_here_and_in_another_process_that_never_loads_pyplot_or_ray():
    first = make_page(3)
    assert make_page.__wrapped__(3) == first
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('report_test', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "sys.stdout.buffer.write(module.make_page(3).encode());"
        "assert 'matplotlib.pyplot' not in sys.modules and 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, __file__], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == first.encode()


def test_settings_of_matplotlib_are_restored():
    before = dict(matplotlib.rcParams)
    make_page.__wrapped__(1)
    assert dict(matplotlib.rcParams) == before


def test_smoothing_keeps_the_level_and_the_last_steps():
    assert smooth([]) == ([], [])
    assert smooth([2.0]) == ([1.0], [2.0])
    steps, curve = smooth([1.0] * 5000)
    assert len(steps) == len(curve) == 200
    assert curve == pytest.approx([1.0] * 200)
    assert steps[0] == pytest.approx(208.5)  # the middle of the first 416 steps, counted from 1
    assert steps[-1] == pytest.approx(5000 - 207.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (4.21, "4.2 s"), (60.0, "1 min 00 s"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
