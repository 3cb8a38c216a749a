"""Plain-text tables."""

from __future__ import annotations

from dataclasses import replace

from mavis_dist.evaluate.sweep import Estimate, PointResult, Sweep, table
from mavis_dist.tables import text_table


def test_a_table_has_a_ruled_head_and_aligned_columns() -> None:
    text = text_table(["name", "speed"], [["a", "1.50"], ["a long name", "2"]], [6, 7])
    assert text.splitlines() == ["name    speed", "-------------", "a        1.50", "a long name      2"]


def test_the_table_of_a_sweep() -> None:
    gain = {"brief": Estimate(0.5, 0.25, 0.75)}
    sweep = Sweep([PointResult("brief", {"brief": 1.0}, gain, gain, 1.5, 20.0)], 0.25, 8, 2.0, [])
    assert table(sweep).splitlines() == [
        "weights                                     brief gain, sd  KL, nats  tokens",
        "----------------------------------------------------------------------------",
        "brief                           +0.50 [+0.25, +0.75]      1.50    20.0",
        "hypervolume 0.250 sd^1, 8 unseen prompts",
    ]
    measured = replace(sweep, points=[replace(sweep.points[0], share=Estimate(0.5, 0.25, 0.75))], limit_answers=64)
    assert table(measured).splitlines() == [
        "weights                                     brief gain, sd  KL, nats  tokens        share of limit",
        "--------------------------------------------------------------------------------------------------",
        "brief                           +0.50 [+0.25, +0.75]      1.50    20.0     0.50 [0.25, 0.75]",
        "hypervolume 0.250 sd^1, 8 unseen prompts",
    ]
