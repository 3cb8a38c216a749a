"""A reward that no value model was trained on: the share of words in the first person."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[a-z]+")
FIRST_PERSON = frozenset({"i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves"})


def first_person(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The share of words in the first person (those of "I'm" are "i" and "m"); 0 without words."""
    shares = []
    for answer in answers:
        words = WORD.findall(answer.lower())
        shares.append(sum(word in FIRST_PERSON for word in words) / max(1, len(words)))
    return shares
