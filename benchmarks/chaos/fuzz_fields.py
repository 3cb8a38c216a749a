"""What clients may send: hypothesis strategies of bodies, mostly good ones with something odd in them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from benchmarks.common.http_load import CHAT, TEXTS

Json = dict[str, Any]

OBJECTIVES = ("brief", "positive")


def mostly(usual: st.SearchStrategy, odd: st.SearchStrategy, one_in: int) -> st.SearchStrategy:
    """`odd` in one of so many cases: one_of counts a strategy once, however often it is named."""
    return st.sampled_from(range(one_in)).flatmap(lambda number: odd if number == one_in - 1 else usual)


TEXT = st.text(st.characters(), max_size=20)  # with lone surrogates, which JSON can spell and UTF-8 cannot
NUMBER = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 10**400, 1e308]))
LEAF = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANYTHING = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6)
WEIGHT = mostly(st.floats(0, 5), NUMBER, 9)
OBJECTIVE = mostly(st.sampled_from(OBJECTIVES), TEXT, 12)
POSITIVE = mostly(st.floats(0, 1e4), NUMBER, 9)
WORDS = mostly(st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=20), TEXT, 10)
SENTENCE = st.fixed_dictionaries({"text": WORDS}, optional={"weight": WEIGHT})
PRESETS = st.sampled_from(["mato", "anchor", "linear_alignment", "opad", "context_steering", "amulet"])


def optional(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """An object with some of the fields; now and then a value of one is anything."""
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
    preferences=st.lists(SENTENCE, max_size=4),
    preference_params=PARAMS,
    beta=POSITIVE,
    tilt_cap=POSITIVE,
    scorer=st.sampled_from([*["full", "lazy"] * 4, "qhead"]),
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
TOLD = st.one_of(st.none(), st.integers(0, 5))  # log-probabilities asked for


def chat(model: str, fields: Json, told: int | None = None) -> Json:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": told is not None, "top_logprobs": told}
    return {"model": model, **asked, "max_tokens": 3, **fields}


def text(model: str, fields: Json, told: int | None = None) -> Json:
    return {"model": model, "prompt": "Hi", "logprobs": told, "max_tokens": 3, **fields}


def questions(model: str) -> st.SearchStrategy[tuple[str, Json]]:
    """Paths and bodies."""
    fields = st.builds(lambda known, extra: {**known, **extra}, FIELDS, EXTRA)
    worded = mostly(fields, st.builds(lambda messages: {"messages": messages}, MESSAGES), 5)
    flat = mostly(fields, st.builds(lambda weights: {"vllm_xargs": {"objective_weights": weights}}, FLAT_WEIGHTS), 5)
    return st.one_of(
        st.tuples(st.just(CHAT), st.builds(chat, st.just(model), worded, TOLD)),
        st.tuples(st.just(TEXTS), st.builds(text, st.just(model), flat, TOLD)),
    )
