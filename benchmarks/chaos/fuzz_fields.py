"""Hypothesis strategies of request bodies, most of them valid except for one odd value."""

from __future__ import annotations

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
WORDS = mostly(st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=20), TEXT, 10)
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
)
MESSAGES = st.lists(optional(role=st.sampled_from(["system", "user", "assistant"]), content=TEXT), max_size=4)
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
    of_chat = mostly(fields, st.builds(lambda messages: {"messages": messages}, MESSAGES), 5)
    of_text = mostly(fields, st.builds(lambda weights: {"vllm_xargs": {"objective_weights": weights}}, FLAT_WEIGHTS), 5)
    return st.one_of(
        st.tuples(st.just(CHAT), st.builds(chat, st.just(model), of_chat, LOGPROBS)),
        st.tuples(st.just(COMPLETIONS), st.builds(text, st.just(model), of_text, LOGPROBS)),
    )
