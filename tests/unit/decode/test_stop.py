"""Stop strings: the end of an answer, its text, and the text that may be streamed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mavis_dist.core import noise
from mavis_dist.decode import Choice, Engine, FinishReason, Request, RequestError, SamplingParams
from mavis_dist.decode.text import REPLACEMENT, StoppedText
from tests.fakes import EOS, Letters, tiny_base
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
BASE = tiny_base(seed=0)
REQUEST = Request("r", (1, 5, 9), params=SamplingParams(max_tokens=16, seed=4))


def text_of(tokens: list[int]) -> str:
    """A character per token."""
    return Letters().decode(tokens)


@cache
def plain() -> Choice:
    [[choice]] = Engine(BASE).generate([REQUEST])
    assert len(choice.text) == REQUEST.params.max_tokens
    return choice


def stopped(*stop: str, **fields) -> Request:
    return replace(REQUEST, params=replace(REQUEST.params, stop=stop), **fields)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("at", [0, 1, 5, 13])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(at, length):
    """That token is the last of the answer; the text ends before the stop string."""
    stop = plain().text[at : at + length]
    at = plain().text.find(stop)
    [[choice]] = Engine(BASE).generate([stopped("never", stop)])
    assert choice.tokens == plain().tokens[: at + length]
    assert choice.logratios == plain().logratios[: at + length]
    assert (choice.text, choice.finish) == (plain().text[:at], FinishReason.STOP)


def test_an_incomplete_stop_string_does_not_end_an_answer():
    """It was held back, but it is part of the text."""
    half = plain().text[-2:] + "?"
    [[choice]] = Engine(BASE).generate([stopped(half)])
    assert (choice.tokens, choice.text) == (plain().tokens, plain().text)
    assert choice.finish is FinishReason.LENGTH


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_that_began_before_a_continuation_ends_it(cut):
    stop = plain().text[5:8]
    [[whole]] = Engine(BASE).generate([stopped(stop)])
    assert len(whole.tokens) == 8
    rest = stopped(stop, answer=tuple(whole.tokens[:cut]), stream=noise.stream(4, 0))
    [[choice]] = Engine(BASE).generate([rest])
    assert (choice.tokens, choice.text, choice.finish) == (whole.tokens[cut:], whole.text, whole.finish)


def test_rows_of_a_batch_end_at_their_own_stop_strings():
    requests = [stopped(*stop, id=str(i)) for i, stop in enumerate([(), (plain().text[3],), (plain().text[6:8],)])]
    together = Engine(BASE).generate(requests)
    assert [c.text for [c] in together] == [Engine(BASE).generate([r])[0][0].text for r in requests]


@pytest.mark.parametrize("stop", [(), ("never",), (5, 6), (5, 8), (14, 16), (0, 1)])
def test_streamed_text_adds_up_to_the_text_of_the_answer(stop):
    """Whole, or continued after four tokens, whose text was already streamed except for a possible stop string."""
    if stop and isinstance(stop[0], int):
        stop = (plain().text[slice(*stop)],)
    request = stopped(*stop)
    [[whole]] = Engine(BASE).generate([request])
    updates = list(Engine(BASE).stream(request))
    assert "".join(update.text for update in updates) == whole.text
    assert [token for update in updates for token in update.tokens] == whole.tokens
    assert updates[-1].finished.text == whole.text
    if len(whole.tokens) > 4:
        rest = replace(request, answer=tuple(whole.tokens[:4]), stream=noise.stream(4, 0))
        shown = "".join(update.text for update in updates[:4])
        assert shown + "".join(update.text for update in Engine(BASE).stream(rest)) == whole.text


def test_the_end_of_answer_token_has_no_text():
    base = tiny_base(seed=0, eos_boost=2.0)
    request = Request("r", (1, 5), params=SamplingParams(max_tokens=40, seed=1, stop=("never",)))
    [[choice]] = Engine(base).generate([request])
    assert choice.tokens[-1] == EOS
    assert choice.text == text_of(choice.tokens[:-1])


def test_an_empty_stop_string_is_rejected():
    with pytest.raises(RequestError, match="stop") as caught:
        Engine(BASE).submit(stopped("a", ""))
    assert caught.value.field == "stop"


# --- text piece by piece ------------------------------------------------------------------------------------------

IDS = [*TOKENIZER("abé")["input_ids"], TOKENIZER.eos_token_id]  # two letters, both halves of an é, the end
STOPS = st.lists(st.text("abé", min_size=1, max_size=3), max_size=3).map(tuple)


def pieces_of(tokens: list[int], lengths: list[int]) -> list[list[int]]:
    """Tokens cut into pieces of these lengths; the last has the rest."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(tokens[start : start + length])
        start += length
    return [*pieces, tokens[start:]]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(tokens=st.lists(st.sampled_from(IDS), max_size=14), lengths=st.lists(st.integers(0, 4), max_size=14), stop=STOPS)
@example(tokens=TOKENIZER("abba")["input_ids"], lengths=[1, 1, 1], stop=("abb", "b"))
def test_text_does_not_depend_on_how_tokens_are_split_into_pieces(tokens, lengths, stop):
    """Including incomplete characters and nested stop strings; no stop string is ever part of the text."""
    whole = StoppedText(TOKENIZER, stop)
    expected = whole.add(tokens, last=True)
    pieces = pieces_of(tokens, lengths)
    text = StoppedText(TOKENIZER, stop)
    shown = [text.add(piece, last=number == len(pieces) - 1) for number, piece in enumerate(pieces)]
    assert "".join(shown) == expected
    assert text.is_stopped == whole.is_stopped
    assert not any(string in expected for string in stop)
    assert TOKENIZER.decode(tokens, skip_special_tokens=True).startswith(expected)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(tokens=st.lists(st.sampled_from(IDS), max_size=14), stop=STOPS)
def test_emitted_text_is_never_retracted(tokens, stop):
    """It is a prefix of every possible text, and lags by less than a stop string and one character."""
    text, shown = StoppedText(TOKENIZER, stop), ""
    longest = max((len(string) for string in stop), default=1)
    for count, token in enumerate(tokens, start=1):
        shown += text.add([token])
        so_far = StoppedText(TOKENIZER, stop).add(tokens[:count], last=True)
        assert so_far.startswith(shown)
        if REPLACEMENT not in so_far:  # invalid bytes are emitted when a character follows
            assert len(so_far) - len(shown) < longest
