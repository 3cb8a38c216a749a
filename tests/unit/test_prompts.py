"""Prompts: the right number, disjoint, reproducible, and a clear error otherwise."""

import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mavis_dist import prompts as loading
from mavis_dist import sections
from mavis_dist.prompts import PromptError, load_prompts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(num, **extra):
    return [{"prompt": f"question {row}?", **extra} for row in range(num)]


def settings(source, **changes):
    return sections.Prompts(**{"source": str(source), "train": 6, "validation": 1, "evaluation": 3, **changes})


def write_table(path, rows):
    if path.suffix == ".jsonl":
        return write(path, rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_file_without_splits_is_one_pool_of_disjoint_rows(tmp_path, name):
    source = write_table(tmp_path / name, questions(9))
    train, evaluation = load_prompts(settings(source), seed=1)
    assert len(train) == 6
    assert {prompt.text for prompt in [*train, *evaluation]} == {f"question {row}?" for row in range(9)}
    assert all(prompt.text == f"question {prompt.id.removeprefix('row-')}?" for prompt in train)


def test_the_seed_determines_the_draw(tmp_path):
    source = write(tmp_path / "p.jsonl", questions(200))
    assert load_prompts(settings(source), seed=1) == load_prompts(settings(source), seed=1)
    assert load_prompts(settings(source), seed=1) != load_prompts(settings(source), seed=2)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_split_column_is_honoured(tmp_path, name):
    rows = [{"prompt": f"{split} {row}?", "split": split} for row in range(8) for split in ("train", "eval")]
    train, evaluation = load_prompts(settings(write_table(tmp_path / name, rows)), seed=1)
    assert all(prompt.text.startswith("train") and prompt.id.startswith("train-") for prompt in train)
    assert all(prompt.text.startswith("eval") for prompt in evaluation)


def test_one_split_for_both_gives_disjoint_rows(tmp_path):
    source = write(tmp_path / "p.jsonl", questions(9, split="all"))
    train, evaluation = load_prompts(settings(source, train_split="all", eval_split="all"), seed=1)
    assert not {prompt.id for prompt in train} & {prompt.id for prompt in evaluation}


def test_a_data_set_with_named_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", questions(7))
    write(folder / "test.jsonl", [{"prompt": f"unseen {row}?"} for row in range(4)])
    train, evaluation = load_prompts(settings(folder, eval_split="test"), seed=1)
    assert {prompt.id.split("-")[0] for prompt in train} == {"train"}
    assert all(prompt.text.startswith("unseen") for prompt in evaluation)
    with pytest.raises(PromptError, match=r"'eval'.*splits"):
        load_prompts(settings(folder), seed=1)


def test_the_builtin_set_is_taken_in_file_order(tmp_path, monkeypatch):
    rows = [
        {"id": f"{split}{row}", "prompt": f"{split} {row}?", "split": split}
        for split in ("train", "eval")
        for row in range(9)
    ]
    monkeypatch.setattr(loading, "BUILTIN", write(tmp_path / "builtin.jsonl", rows))
    train, evaluation = load_prompts(settings("builtin"), seed=5)
    assert [prompt.id for prompt in train] == [f"train{row}" for row in range(6)]
    assert [prompt.id for prompt in evaluation] == [f"eval{row}" for row in range(3)]


def test_no_evaluation_prompt_has_the_text_of_a_training_prompt(tmp_path):
    rows = [
        *questions(9, split="train"),
        *questions(9, split="eval"),
        *[{"prompt": f"new {row}?", "split": "eval"} for row in range(3)],
    ]
    train, evaluation = load_prompts(settings(write(tmp_path / "p.jsonl", rows), train=9), seed=1)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in evaluation}


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_the_field_is_a_column(tmp_path, name):
    source = write_table(tmp_path / name, [{"question": f"q{row}", "topic": "x"} for row in range(9)])
    assert len(load_prompts(settings(source, field="question"), seed=1)[1]) == 3
    with pytest.raises(PromptError, match=r"no column 'prompt': set prompts.field to one of question, topic"):
        load_prompts(settings(source), seed=1)


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    rows = [{"prompt": f"one\u2028two {row}"} for row in range(9)]
    source = tmp_path / "p.jsonl"
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert "\u2028" in load_prompts(settings(source), seed=1)[0][0].text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 of .* is not JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2 of .* is not a JSON object"),
        ('{"prompt": "a"}\n{"prompt": "  "}\n' * 9, r"row \d*[13579] .*'  '"),
        ('{"prompt": "a"}\n{"prompt": 3}\n' * 9, r"row \d*[13579] .* has 3"),
        ('{"prompt": "a"}\n{"id": "x"}\n' * 9, r"row \d*[13579] .* has None"),
        ("".join(f'{{"id": "x", "prompt": "{row}"}}\n' for row in range(9)), "the id 'x' twice"),
        ('{"prompt": "a", "split": "train"}\n', "no split 'eval': .* to train"),
        ('{"prompt": "a"}\n', "only 1 prompts for prompts.train=6: lower prompts.train"),
    ],
)
def test_invalid_content_is_named(tmp_path, content, sentence):
    source = tmp_path / "p.jsonl"
    source.write_text(content)
    # Two texts only: a long evaluation set would run out of unseen ones.
    with pytest.raises(PromptError, match=sentence):
        load_prompts(settings(source, evaluation=1), seed=1)


def test_too_few_left_for_the_evaluation(tmp_path):
    with pytest.raises(PromptError, match=r"only 2 prompts for prompts.evaluation=3 .*: lower prompts.evaluation"):
        load_prompts(settings(write(tmp_path / "p.jsonl", questions(8))), seed=1)


@pytest.mark.parametrize("source", ["no/such.jsonl", "no/such.parquet"])
def test_a_missing_file_is_named(source):
    with pytest.raises(PromptError, match=re.escape(f"{os.path.abspath(source)!r} does not exist")):
        load_prompts(settings(source), seed=1)


def test_damaged_files_are_named(tmp_path):
    broken = tmp_path / "p.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(PromptError, match=r"p\.parquet"):
        load_prompts(settings(broken), seed=1)
    latin = tmp_path / "p.jsonl"
    latin.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompts(settings(latin), seed=1)


def test_a_data_set_that_cannot_be_reached_is_named():
    with pytest.raises(PromptError, match="'nobody/nothing' cannot be read"):
        load_prompts(settings("nobody/nothing"), seed=1)
