"""The shipped prompt set: well-formed, varied, and with evaluation topics that training never sees."""

import itertools
import json
from collections import Counter
from difflib import SequenceMatcher
from itertools import pairwise

import pytest
import torch

from mavis_dist.rewards.embedding import Relevance
from tests.root import ROOT

PROMPTS = ROOT / "mavis_dist" / "data" / "prompts.jsonl"
TRAIN, EVAL, STRETCH = 1080, 360, 20
NEAR_DUPLICATE = 0.7  # of the characters
# Pairs of that likeness share far more of their trigrams, unless the matched characters are scattered.
SHARED_TRIGRAMS = 0.35
SAME_MEANING = 0.75  # cosine of the embeddings of any two prompts
SAME_SUBJECT = 0.65  # and of a training and an evaluation prompt


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def of(rows: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    return [row for row in rows if row["split"] == split]


def test_every_line_has_the_four_fields_and_ids_count_up(rows: list[dict[str, str]]) -> None:
    assert all(row.keys() == {"id", "prompt", "topic", "split"} for row in rows)
    assert [row["id"] for row in rows] == [f"everyday-{i:04d}" for i in range(1, len(rows) + 1)]


def test_split_sizes(rows: list[dict[str, str]]) -> None:
    assert Counter(row["split"] for row in rows) == {"train": TRAIN, "eval": EVAL}


def test_eval_prompts_are_spread_through_the_file(rows: list[dict[str, str]]) -> None:
    """A reader may take the first N lines, so every stretch holds both splits in the same proportion."""
    for start in range(0, len(rows), STRETCH):
        assert len(of(rows[start : start + STRETCH], "eval")) == STRETCH * EVAL // len(rows)


def test_lengths_and_characters(rows: list[dict[str, str]]) -> None:
    for row in rows:
        prompt = row["prompt"]
        assert 15 <= len(prompt) <= 200, prompt
        assert prompt == " ".join(prompt.split()), prompt
        assert prompt.isascii(), prompt


def test_splits_share_no_topic(rows: list[dict[str, str]]) -> None:
    train, held_out = ({row["topic"] for row in of(rows, split)} for split in ("train", "eval"))
    assert not train & held_out
    assert len(train) >= 40
    assert len(held_out) >= 12
    assert min(Counter(row["topic"] for row in rows).values()) >= 15


@pytest.mark.parametrize("split", ["train", "eval"])
def test_topics_alternate(rows: list[dict[str, str]], split: str) -> None:
    """The first N prompts of a split are of as many topics as possible, whatever N is."""
    topics = [row["topic"] for row in of(rows, split)]
    assert all(a != b for a, b in pairwise(topics))
    distinct = len(set(topics))
    for start in range(0, len(topics) - distinct, distinct):
        assert len(set(topics[start : start + distinct])) >= 0.8 * distinct


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_first_prompts_are_varied(rows: list[dict[str, str]], split: str) -> None:
    """They open in many different ways, and not all of them are questions."""
    first = [row["prompt"] for row in of(rows, split)[:20]]
    assert len({tuple(prompt.split()[:2]) for prompt in first}) >= 12
    assert 2 <= sum("?" not in prompt for prompt in first) <= 12


def test_no_prompt_nearly_repeats_another(rows: list[dict[str, str]]) -> None:
    prompts = [row["prompt"].casefold() for row in rows]
    trigrams = [{prompt[i : i + 3] for i in range(len(prompt) - 2)} for prompt in prompts]
    matcher = SequenceMatcher(autojunk=False)
    for (a, in_a), (b, in_b) in itertools.combinations(zip(prompts, trigrams, strict=True), 2):
        if 2 * len(in_a & in_b) >= SHARED_TRIGRAMS * (len(in_a) + len(in_b)):
            matcher.set_seqs(a, b)
            assert matcher.ratio() < NEAR_DUPLICATE, (a, b)


@pytest.mark.real_model
def test_no_prompt_means_what_another_does(rows: list[dict[str, str]]) -> None:
    """Training and evaluation prompts are further apart still: evaluation asks about other subjects."""
    ordered = sorted(rows, key=lambda row: len(row["prompt"]))  # prompts of one length need no padding
    embeddings_ND = Relevance("all-minilm-l6-v2")._embed([row["prompt"] for row in ordered])
    cosines_NN = (embeddings_ND @ embeddings_ND.T).fill_diagonal_(-1)
    is_eval_N = torch.tensor([row["split"] == "eval" for row in ordered])
    assert_below(SAME_MEANING, cosines_NN, ordered)
    assert_below(SAME_SUBJECT, cosines_NN.where(is_eval_N[:, None] & ~is_eval_N, -1), ordered)


def assert_below(limit: float, cosines_NN: torch.Tensor, rows: list[dict[str, str]]) -> None:
    a, b = divmod(int(cosines_NN.argmax()), len(rows))
    assert cosines_NN[a, b] < limit, (rows[a]["prompt"], rows[b]["prompt"])
