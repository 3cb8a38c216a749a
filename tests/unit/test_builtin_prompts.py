"""The shipped prompt set: well-formed, varied, and with an evaluation split that training never sees."""

import itertools
import json
from difflib import SequenceMatcher

import pytest

from tests.root import ROOT

PROMPTS = ROOT / "mavis_dist" / "data" / "prompts.jsonl"
NEAR_DUPLICATE = 0.7


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def test_every_line_has_the_three_fields_and_ids_count_up(rows):
    assert all(row.keys() == {"id", "prompt", "split"} for row in rows)
    assert [row["id"] for row in rows] == [f"everyday-{i:04d}" for i in range(1, len(rows) + 1)]


def test_split_sizes(rows):
    splits = [row["split"] for row in rows]
    assert (splits.count("train"), splits.count("eval")) == (240, 80)
    assert len(rows) == 320


def test_eval_prompts_are_spread_through_the_file(rows):
    """A reader may take the first N lines, so every stretch holds both splits in the same proportion."""
    for start in range(0, len(rows), 20):
        assert sum(row["split"] == "eval" for row in rows[start : start + 20]) == 5


def test_lengths_and_characters(rows):
    for row in rows:
        prompt = row["prompt"]
        assert 15 <= len(prompt) <= 200, prompt
        assert prompt == " ".join(prompt.split()), prompt
        assert prompt.isascii(), prompt


def test_splits_share_no_prompt(rows):
    train, held_out = ({row["prompt"].casefold() for row in rows if row["split"] == s} for s in ("train", "eval"))
    assert (len(train), len(held_out)) == (240, 80)
    assert not train & held_out


def test_no_near_duplicates(rows):
    matcher = SequenceMatcher(autojunk=False)
    for a, b in itertools.combinations((row["prompt"].casefold() for row in rows), 2):
        matcher.set_seqs(a, b)
        # The first two are cheap upper bounds of the third.
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        assert not all(bound() >= NEAR_DUPLICATE for bound in bounds), (a, b)


def test_the_first_prompts_are_varied(rows):
    """The first twenty training prompts open in many different ways."""
    openings = {tuple(row["prompt"].split()[:2]) for row in [r for r in rows if r["split"] == "train"][:20]}
    assert len(openings) >= 12
