"""The prompt of a preference differs from the plain one only in the preference."""

from __future__ import annotations

import pytest

from mavis_dist.decode import Engine, Request, RequestError, SamplingParams, chat_prompts
from mavis_dist.models.load import PLAIN_TEMPLATE, chat_ids, load_base
from tests.tiny import make_tokenizer, write_base

PREFERENCES = [("Be brief.", 2.0), ("Be odd.", 0.0), ("Be kind.", 1.0)]
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
)
WITHOUT_SYSTEM_TEXT = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"


def tokenizer_with(template: str | None):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def texts(template: str | None, conversation, system: str = "Be good."):
    tokenizer = tokenizer_with(template)
    prompt, preferences = chat_prompts(tokenizer, conversation, PREFERENCES, system)
    assert prompt == tuple(chat_ids(tokenizer, as_turns(conversation), system))
    assert [(p.text, p.weight) for p in preferences] == PREFERENCES
    assert preferences[1].prompt == ()
    return [tokenizer.decode(list(ids)) for ids in (prompt, preferences[0].prompt, preferences[2].prompt)]


def as_turns(conversation):
    return [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM, None], ids=["chat", "no system turns", "plain"])
def test_a_preference_is_a_line_after_the_system_text(template):
    plain, brief, kind = texts(template, "Hello")
    assert brief == plain.replace("Be good.", "Be good.\nBe brief.")
    assert kind == plain.replace("Be good.", "Be good.\nBe kind.")
    assert brief != plain


def test_the_system_text_of_the_conversation_takes_precedence():
    turns = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": "Hello"}]
    plain, brief, _ = texts(CHAT, turns)
    assert "Be good." not in plain
    assert brief == plain.replace("a cat.", "a cat.\nBe brief.")


def test_a_preference_that_the_template_drops_is_rejected(tmp_path):
    base = load_base(str(write_base(tmp_path)))
    base.tokenizer.chat_template = WITHOUT_SYSTEM_TEXT
    prompt, preferences = chat_prompts(base.tokenizer, "Hello", PREFERENCES)
    with pytest.raises(RequestError, match=r"preferences: 'Be brief\.' changes nothing in the prompt"):
        Engine(base).validate(Request("r", prompt, preferences=preferences, params=SamplingParams(max_tokens=2)))


def test_without_a_template_turns_are_labelled():
    assert "User:" in PLAIN_TEMPLATE
    assert texts(None, "Hello")[1].rstrip().endswith("User: Hello\n\nAssistant:")
