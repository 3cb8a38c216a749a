"""The page of a comparison: complete, self-contained, and safe with any answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mavis_dist.compare.figures import summarise
from mavis_dist.compare.plots import styles
from mavis_dist.compare.report import examples_of, write_report
from mavis_dist.compare.results import Judged, TrainingCost
from mavis_dist.config import Config
from mavis_dist.evaluate.sweep import Estimate
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt
from tests.unit.compare.made_up import NUM_PROMPTS, made_up

HOSTILE = "</script><script>alert(1)</script> & <b>"
METHODS = ["base", "mavis", "weak", "short", "unknown"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With the report of a made-up comparison in which one answer is hostile."""
    measured = made_up()
    cell, found = next((cell, found) for cell, found in measured.cells.items() if cell.method == "mavis")
    cells = {
        key: replace(found, text=[HOSTILE, *found.text[1:]]) if key.weights == cell.weights else one
        for key, one in measured.cells.items()
    }
    hostile = replace(measured, cells=cells)
    judged = {"weak": Judged(Estimate(0.3125, 0.25, 0.375), 3, 4, 9, 2)}
    comparison = summarise(
        hostile,
        dict.fromkeys(METHODS, TrainingCost(60.0, 20.0, 9000, 3000, ["a <tiny> GPU"])),
        {"base model": "a <tiny> one"},
        judged,
    )
    prompts = [Prompt(f"p{i}", f"question {i}?") for i in range(NUM_PROMPTS)]
    config = Config(run="made-up", objectives={"a": {"reward": "sentiment"}, "b": {"reward": "brevity"}})
    store = Store(str(tmp_path_factory.mktemp("report")), "made-up")
    path = write_report(config, store, comparison, examples_of(hostile, prompts))
    assert Path(path).is_file()
    return store


@pytest.fixture(scope="module")
def page(store: Store) -> str:
    return store.read_bytes(layout.COMPARISON_REPORT).decode()


def test_it_shows_methods_winners_conditions_and_settings(page: str) -> None:
    assert all(f"</span>{method}</th>" in page for method in METHODS)
    assert page.count("<mark>") == 1  # the share of the limit; nothing else has a winner
    assert "a &lt;tiny&gt; one" in page
    assert "compare.kl" in page


def test_verdicts_of_a_judge_are_counted(page: str) -> None:
    section = re.search(r'<section aria-labelledby="judged">.*?</section>', page, re.DOTALL)
    assert section is not None
    assert all(f'<td class="num">{count}</td>' in section[0] for count in (3, 4, 9, 2))
    assert "0.31" in section[0]
    assert section[0].count("<tr>") == 2


def test_it_loads_nothing_and_runs_one_script_that_is_pinned(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r'xlink:href="#', "", page))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    pinned = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{pinned}'" in page
    assert "default-src 'none'" in page


def test_answers_are_data_and_never_markup(page: str) -> None:
    assert "<script>alert" not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(data)
    assert shown["methods"]["mavis"]["a"][0] == HOSTILE
    assert len(shown["prompts"]) == NUM_PROMPTS
    assert shown["weights"] == ["a", "b", "0.5 a + 0.5 b"]
    assert shown["methods"].keys() == set(METHODS)


def test_plots_are_files_in_colours_of_their_own(store: Store) -> None:
    for name in ("front-a-b", "gain-by-divergence", "cost"):
        svg = store.read_bytes(layout.comparison_plot(name, "svg")).decode()
        assert svg.startswith("<svg")
        assert "var(--" not in svg
        assert store.read_bytes(layout.comparison_plot(name, "png")).startswith(b"\x89PNG")


def test_no_two_methods_look_alike() -> None:
    whole = summarise(made_up(), dict.fromkeys(METHODS, TrainingCost()), {})
    rows = [replace(whole.methods[1], method=f"method {n}") for n in range(40)]
    found = styles(replace(whole, methods=[*whole.methods, *rows]))
    assert len({(style.colour, style.marker) for style in found.values()}) == len(found) == 45
