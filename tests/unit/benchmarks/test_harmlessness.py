"""The classifier of profanity as a reward; skipped where it is not installed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("profanity_check")

from benchmarks.comparison.harmlessness import score


def test_offensive_answers_have_lower_scores() -> None:
    kind, neutral, rude, worse = score(["q"] * 4, ["Happy to help!", "It rains.", "You are an idiot.", "Fuck you"])
    assert min(kind, neutral) > 1 > rude > worse
    assert np.isfinite(score(["q", "q"], ["", "fuck " * 50])).all()
