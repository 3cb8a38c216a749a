"""Every prompt is tried before a run begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mavis_dist.config import Config
from mavis_dist.models.load import load_skeleton
from mavis_dist.preflight import describe
from mavis_dist.preflight.checks import check_prompts, shortest_context
from mavis_dist.prompts import PromptError, PromptSet
from tests.tiny import write_base
from tests.unit.models.test_chat import DROPS_SYSTEM, NO_SYSTEM, PARTS_ONLY

CONTEXT, LONGEST_ANSWER = 1024, 24
LONG = "word " * 300  # 1,500 tokens


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_base(tmp_path)


@pytest.fixture
def check(model: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    def checked(rows: list[dict[str, Any]], template: str | None = None, **changes: Any) -> dict[str, str]:
        source = tmp_path / "p.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if template is not None:
            (model / "chat_template.jinja").write_text(template)
        config = Config(
            run="r",
            objectives={"a": {"reward": "sentiment"}},
            base={"model": str(model), "system": changes.pop("system", "Be kind.")},
            prompts={"source": str(source), "train": 6, "validation": 2, "evaluation": 3, **changes.pop("prompts", {})},
            rollout={"max_tokens": LONGEST_ANSWER},
            **changes,
        )
        base = load_skeleton(str(model))
        prompts, _ = check_prompts(config, base)
        return dict(describe.notes(config, base, prompts))

    return checked


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {row}?"} for row in range(count)]


def conversations(count: int, *before: dict[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": [*before, {"role": "user", "content": f"question {row}?"}]} for row in range(count)]


def test_of_prompts_that_can_be_asked_nothing_is_noted(check) -> None:
    assert check(questions(9)) == {}


def test_the_limit_that_is_told_is_the_one_that_counts(model: Path, tmp_path: Path) -> None:
    short = write_base(tmp_path / "short")
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 400}))
    base, drawn = load_skeleton(str(model)), PromptSet("builtin", [], [], {}, {})
    for value, limit in (({}, "base.model .* for 1024"), ({"backbone": str(short)}, "value.backbone .* for 400")):
        config = Config(run="r", objectives={"a": {"reward": "sentiment"}}, base={"model": str(model)}, value=value)
        told = dict(describe.prompts(config, drawn, 7, *shortest_context(config, base)))
        assert re.search(limit, told["prompts"])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_prompt_without_room_for_an_answer_is_named(check, split: str) -> None:
    rows = [{"prompt": f"train {row}?", "split": "train"} for row in range(6)]
    rows += [{"prompt": f"eval {row}?", "split": "eval"} for row in range(3)]
    next(row for row in rows if row["split"] == split).update(prompt=LONG, id="the-long-one")
    where = rf"row \d of split '{split}' of prompts\.source .*p\.jsonl' \(id 'the-long-one'\)"
    with pytest.raises(PromptError, match=rf"{where} has 1\d\d\d tokens, and with rollout\.max_tokens=24 more than"):
        check(rows)


def test_a_prompt_fits_with_its_answer_to_the_last_token(check) -> None:
    around = len("<s>") - 2 + len("Be kind.\n\nUser: \n\nAssistant:")  # one token a letter, <s> is one
    longest = CONTEXT - LONGEST_ANSWER - around
    check([*questions(8), {"prompt": "x" * longest}])
    with pytest.raises(
        PromptError, match=r"row 8 of .* has 1001 tokens, .*context of base\.model .* \(1024\): shorten"
    ):
        check([*questions(8), {"prompt": "x" * (longest + 1)}])


def test_value_models_with_a_shorter_context_count(check, tmp_path: Path) -> None:
    short = write_base(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    with pytest.raises(PromptError, match=r"context of value\.backbone .* \(40\)"):
        check(questions(9), value={"backbone": str(short)})


def test_a_prompt_that_the_template_rejects_is_named(check) -> None:
    twice = conversations(1, {"role": "user", "content": "a"})
    with pytest.raises(PromptError, match=r"row 8 of .* cannot be asked: .*Roles must alternate"):
        check([*conversations(8), *twice], NO_SYSTEM, prompts={"format": "conversation"})


def test_a_system_message_of_a_prompt_is_never_dropped(check) -> None:
    with pytest.raises(PromptError, match="leaves out the system message"):
        check(conversations(9, {"role": "system", "content": "S"}), DROPS_SYSTEM, prompts={"format": "conversation"})


def test_a_system_text_that_cannot_be_given_is_noted(check) -> None:
    [note] = check(questions(9), DROPS_SYSTEM).values()
    assert "base.system is not given to" in note


@pytest.mark.parametrize(
    ("template", "system"), [(DROPS_SYSTEM, ""), (NO_SYSTEM, "Be kind."), (PARTS_ONLY, "Be kind.")]
)
def test_nothing_is_noted_where_the_system_text_is_given(check, template: str, system: str) -> None:
    assert check(questions(9), template, system=system) == {}


def test_what_is_left_out_and_what_ends_answers_is_noted(check, model: Path) -> None:
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 9}))
    notes = check([*questions(9), *questions(9)])
    assert "left out because another prompt has their text" in notes["prompts"]
    assert "any of these tokens ends an answer: '</s>' (1: config.json, tokenizer), " in notes["model"]
