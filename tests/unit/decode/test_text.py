"""Incremental decoding to text: whole characters, without stop strings."""

from __future__ import annotations

import pytest

from mavis_dist.decode.text import Detokenizer, StoppedText
from tests.tiny import make_spaced_tokenizer, make_tokenizer

TOKENIZER = make_tokenizer()  # a token for each byte


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_characters_that_span_tokens_are_returned_whole():
    ids = ids_of("a é éb")
    assert len(ids) == 8  # two tokens for each é
    text = Detokenizer(TOKENIZER)
    pieces = [text.add((id,), last=place == len(ids) - 1) for place, id in enumerate(ids)]
    assert pieces == ["a", " ", "", "é", " ", "", "é", "b"]


def test_an_incomplete_character_at_the_end_is_not_lost():
    text = Detokenizer(TOKENIZER)
    assert text.add(ids_of("aé")[:-1]) == ""
    assert text.add((), last=True) == "a\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two. three.", [". t"], "one"),
        ("abababcab", ["ababc"], "ab"),
        ("aé éé b", ["éé"], "aé "),
        ("say END now", ["now", "END"], "say "),
        ("almost EN", ["END"], "almost EN"),
        ("END", ["END"], ""),
        ("nothing", [], "nothing"),
    ],
)
def test_no_part_of_a_stop_string_is_returned(text, stop, expected, size):
    ids = ids_of(text)
    stopped, out = StoppedText(TOKENIZER, stop), ""
    for start in range(0, len(ids), size):
        out += stopped.add(ids[start : start + size], last=start + size >= len(ids))
        assert expected.startswith(out)
    assert out == expected
    assert stopped.is_stopped == (expected != text)


SPACED = make_spaced_tokenizer()


def test_a_text_that_goes_on_keeps_its_first_space():
    before, ids = SPACED("the sky is")["input_ids"], SPACED("blue and high")["input_ids"]
    assert SPACED.decode(ids[:1]) == "b"
    for context in (before, before * 20, before[-1:]):
        text = Detokenizer(SPACED, context)
        assert "".join(text.add((id,)) for id in ids) == " blue and high"
    assert Detokenizer(SPACED).add(ids) == Detokenizer(SPACED, SPACED.all_special_ids).add(ids) == "blue and high"


def test_a_text_that_completes_a_character_is_not_lost():
    ids = ids_of("aéb")
    assert Detokenizer(TOKENIZER, ids[:2]).add(ids[2:]) == "\ufffdb"


@pytest.mark.parametrize("stop", [" b", " blue a"])
def test_stop_strings_that_begin_with_the_space_of_a_text_that_goes_on(stop):
    before, ids = SPACED("the sky is")["input_ids"], SPACED("blue and high")["input_ids"]
    stopped = StoppedText(SPACED, [stop], before)
    assert "".join(stopped.add((id,)) for id in ids) == ""
    assert stopped.is_stopped
    assert StoppedText(SPACED, [stop]).add(ids, last=True) == "blue and high"
