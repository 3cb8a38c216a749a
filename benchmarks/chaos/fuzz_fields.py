"""Hypothesis strategies of request bodies, most of them valid except for one odd value, and of bytes that are none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from benchmarks.common.http_load import CHAT, COMPLETIONS

Json = dict[str, Any]

OBJECTIVES = ("brief", "positive")


def mostly(usual: st.SearchStrategy, odd: st.SearchStrategy, one_in: int) -> st.SearchStrategy:
    """`odd` in one of `one_in` cases: one_of gives a strategy no more weight if it is repeated."""
    return st.sampled_from(range(one_in)).flatmap(lambda number: odd if number == one_in - 1 else usual)


TEXT = st.text(st.characters(), max_size=20)  # with lone surrogates, which JSON can express and UTF-8 cannot
NUMBER = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 10**400, 1e308]))
LEAF = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANYTHING = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6)
WEIGHT = mostly(st.floats(0, 5), NUMBER, 9)
OBJECTIVE = mostly(st.sampled_from(OBJECTIVES), TEXT, 12)
POSITIVE = mostly(st.floats(0, 1e4), NUMBER, 9)
PRINTED = st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=20)
WORDS = mostly(PRINTED, st.one_of(TEXT, st.just("\0")), 10)
PREFERENCE = st.fixed_dictionaries({"text": WORDS}, optional={"weight": WEIGHT})
PRESETS = st.sampled_from(["mato", "anchor", "linear_alignment", "opad", "context_steering", "amulet"])


def optional(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """An object with some of the fields, a few of them with arbitrary values."""
    values = {name: mostly(known, ANYTHING, 30) for name, known in fields.items()}
    return st.fixed_dictionaries({}, optional=values)


PARAMS = optional(
    preset=PRESETS,
    adapt=st.booleans(),
    tau=POSITIVE,
    accumulation=st.sampled_from(["mean", "sum", "decay"]),
    decay=POSITIVE,
    clip=POSITIVE,
    c=st.floats(0, 8),
    alpha=POSITIVE,
    lam=POSITIVE,
    nu=POSITIVE,
    steps=st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    normalise=st.booleans(),
)
FIELDS = optional(
    objective_weights=st.dictionaries(OBJECTIVE, WEIGHT, max_size=3),
    preferences=st.lists(PREFERENCE, max_size=4),
    preference_params=PARAMS,
    beta=POSITIVE,
    tilt_cap=POSITIVE,
    residual_cap=POSITIVE,
    scorer=st.sampled_from([*["full", "lazy"] * 4, "predicted", "qhead"]),
    guide_every=st.integers(1, 5),
    temperature=POSITIVE,
    top_k=st.integers(1, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    n=st.integers(1, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(WORDS, max_size=3),
    metadata=st.dictionaries(TEXT, TEXT, max_size=2),
    stream=st.booleans(),
    split_special_tokens=st.booleans(),
    echo=st.booleans(),
    ignore_eos=st.booleans(),  # this and the next three as other servers have them
    min_tokens=st.integers(0, 2),
    repetition_penalty=st.sampled_from([1, 1.0, 1.2]),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=1),
)
CONTROL = st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", " ", "Hi", "\0"]), min_size=1, max_size=4).map("".join)
SPOKEN = mostly(CONTROL, WORDS, 2)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": SPOKEN})
ROLE = st.sampled_from(["system", "user", "assistant", "developer"])
TURN = st.fixed_dictionaries({"role": ROLE, "content": mostly(SPOKEN, st.lists(PART, max_size=2), 5)})
MESSAGES = st.lists(
    mostly(TURN, optional(role=st.one_of(ROLE, TEXT), content=mostly(SPOKEN, ANYTHING, 3)), 12), min_size=1, max_size=4
)
ENDINGS = optional(continue_final_message=st.booleans(), add_generation_prompt=st.booleans(), echo=st.booleans())
IDS = st.lists(mostly(st.integers(0, 99), NUMBER, 20), min_size=1, max_size=5)
PROMPT = st.one_of(
    SPOKEN, st.lists(SPOKEN, max_size=3), IDS, st.lists(IDS, max_size=3), st.lists(st.one_of(IDS, SPOKEN), max_size=3)
)
FLAT_WEIGHTS = st.one_of(TEXT, st.from_regex(r"(brief|positive)=[0-9.e-]{1,5}(,(brief|positive)=[0-9.e-]{1,5})?"))
EXTRA = mostly(st.just({}), st.dictionaries(TEXT, ANYTHING, max_size=1), 10)
LOGPROBS = st.one_of(st.none(), st.integers(0, 5))  # alternatives per token


def chat(model: str, fields: Json, logprobs: int | None = None) -> Json:
    messages = [{"role": "user", "content": "Hi"}]
    requested = {"logprobs": logprobs is not None, "top_logprobs": logprobs}
    return {"model": model, "messages": messages, **requested, "max_tokens": 3, **fields}


def text(model: str, fields: Json, logprobs: int | None = None) -> Json:
    return {"model": model, "prompt": "Hi", "logprobs": logprobs, "max_tokens": 3, **fields}


def request_bodies(model: str) -> st.SearchStrategy[tuple[str, Json]]:
    """Paths and bodies."""
    fields = st.builds(lambda known, extra: {**known, **extra}, FIELDS, EXTRA)
    spoken = st.builds(lambda turns, ending, known: {**known, **ending, "messages": turns}, MESSAGES, ENDINGS, FIELDS)
    written = st.builds(lambda prompt, known: {**known, "prompt": prompt}, PROMPT, FIELDS)
    of_chat = mostly(fields, spoken, 3)
    flat = st.builds(lambda weights: {"vllm_xargs": {"objective_weights": weights}}, FLAT_WEIGHTS)
    of_text = mostly(mostly(fields, written, 3), flat, 6)
    return st.one_of(
        st.tuples(st.just(CHAT), st.builds(chat, st.just(model), of_chat, LOGPROBS)),
        st.tuples(st.just(COMPLETIONS), st.builds(text, st.just(model), of_text, LOGPROBS)),
    )


def conversations(model: str) -> st.SearchStrategy[tuple[str, Json]]:
    """Paths and bodies whose messages a chat template may refuse, drop or rewrite."""
    asked = st.builds(lambda messages, ending: {"messages": messages, **ending}, MESSAGES, ENDINGS)
    return st.tuples(st.just(CHAT), st.builds(chat, st.just(model), asked))


Sent = tuple[str, bytes, Mapping[str, str]]  # path, content, headers

BYTES: list[Callable[[bytes], bytes]] = [
    lambda content: content,
    gzip.compress,
    lambda content: content[: len(content) // 2],
    lambda content: content + b"}",
    lambda content: content.replace(b'"', b"'"),
    lambda content: content.replace(b"Hi", b"\xe9\xff"),
    lambda content: content.replace(b"Hi", b"\\ud83d"),
    lambda content: content.replace(b": 3", b": NaN"),
    lambda content: content.replace(b": 3", b": " + b"9" * 5000),
    lambda content: content.replace(b"{", b'{"model": "x", ', 1),
    lambda content: content.decode().encode("utf-16"),
    lambda content: b"[" * 100_000,
    lambda content: b'{"messages":' * 30_000,
    lambda content: b"[" + content + b"]",
    lambda content: b"",
]
TYPES = ["application/json", "application/json; charset=latin-1", "application/x-www-form-urlencoded", "text/plain", ""]


def sent_bytes(model: str) -> st.SearchStrategy[Sent]:
    """Requests that went wrong before anybody looked at their fields; some did not."""

    def sent(asked: tuple[str, Json], spoil: Callable[[bytes], bytes], kind: str, coding: str, slash: str) -> Sent:
        headers = {"content-type": kind, "content-encoding": coding}
        content = spoil(json.dumps(asked[1]).encode())
        return asked[0] + slash, content, {name: value for name, value in headers.items() if value}

    asked = st.sampled_from([(CHAT, chat(model, {})), (COMPLETIONS, text(model, {}))])
    kinds = mostly(st.just(TYPES[0]), st.sampled_from(TYPES), 4)
    coding = mostly(st.just(""), st.sampled_from(["gzip", "identity", "br"]), 6)
    return st.builds(sent, asked, st.sampled_from(BYTES), kinds, coding, st.sampled_from(["", "/"]))
