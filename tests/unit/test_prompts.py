"""Prompts: the right number, disjoint, reproducible, and a clear error otherwise."""

import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mavis_dist import config as config_module
from mavis_dist import prompts as loading
from mavis_dist import sections
from mavis_dist.prompts import PromptError, draw_prompts, load_prompts
from mavis_dist.rewards.classifier import fill
from tests.root import ROOT


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


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_splits_may_be_numbers_and_rows_without_one_are_no_split(tmp_path, name):
    rows = [{"prompt": f"{split} {row}?", "split": split} for row in range(8) for split in (0, 1, None)]
    source = write_table(tmp_path / name, rows)
    train, evaluation = load_prompts(settings(source, train_split="0", eval_split="1"), seed=1)
    assert all(prompt.text.startswith("0") for prompt in train)
    assert all(prompt.text.startswith("1") for prompt in evaluation)
    with pytest.raises(PromptError, match=r"has no split 'None': .* to 0, 1$"):
        load_prompts(settings(source, train_split="None"), seed=1)


def test_a_split_column_without_any_name_is_none(tmp_path):
    train, _ = load_prompts(settings(write(tmp_path / "p.jsonl", questions(9, split=None))), seed=1)
    assert all(prompt.id.startswith("row-") for prompt in train)


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
        ('{"prompt": "a"}\n' + "[" * 100_000 + "\n", "line 2 of .* is not JSON"),
        ('{"prompt": "a"}\n' + '{"a": ' * 100_000 + "\n", "line 2 of .* is not JSON"),
        ('{"prompt": "a"}\n{"prompt": ' + "1" * 5000 + "}\n", "line 2 of .* is not JSON .*digits"),
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


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.jsonl.gz", "p.JSONL", "p.txt", "p"])
def test_a_file_of_another_format_is_told_which_are_read(tmp_path, name):
    source = write(tmp_path / name, questions(12))
    with pytest.raises(PromptError, match=rf"{name}' is neither a \.jsonl file, .* nor a \.parquet file: convert it"):
        load_prompts(settings(source), seed=1)


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


# --- what is a prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("bad \ud83d", r"half of a surrogate pair ('\ud83d')"),
        ("\udc00 first", "half of a surrogate pair"),
        ("a\0b", "a NUL character"),
        ("\n\t ", "non-empty text"),
        ("\u200b\ufeff", "non-empty text"),
        ("\x1b\x07", "non-empty text"),
        (["a"], "set prompts.format=conversation"),
        ({"text": "a"}, "set prompts.format=conversation"),
        (True, "non-empty text"),
        ("\n\nHuman: q\n\nAssistant: a", "set prompts.format=dialogue"),
        ("Human: q\nAssistant: a", "set prompts.format=dialogue"),
        ("User: q\n\nAssistant: a", "set prompts.format=dialogue"),
        ("Human: q Assistant: a", "set prompts.format=dialogue"),
        ("### human: q\n### assistant: a", "set prompts.format=dialogue"),
        ("System: S\n\nUser: q\n\nAI: a", "set prompts.format=dialogue"),
        ("Assistant: a\n\nHuman: q", "set prompts.format=dialogue"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, value, words):
    rows = [*questions(9), {"prompt": value, "id": "the-bad-one"}]
    with pytest.raises(PromptError) as caught:
        load_prompts(settings(write(tmp_path / "p.jsonl", rows), train=7), seed=1)
    message = str(caught.value)
    assert re.search(r"row 9 of prompts\.source .*p\.jsonl' \(id 'the-bad-one'\) has", message)
    assert words in message
    assert "\n" not in message
    assert message.encode()


@pytest.mark.parametrize(
    "value",
    [
        'What does "Assistant: x" mean in a transcript {row}?',
        "Who writes like this {row}?\n\nHuman: hi\n\nAssistant: ho",
        "AI: friend or foe {row}?",
        "User: an odd word for a person {row}?",
        "System: Linux {row}\nUser: root\nWhy is access denied?",
    ],
)
def test_questions_about_labels_are_questions(tmp_path, value):
    rows = [{"prompt": value.format(row=row)} for row in range(9)]
    texts = {prompt.text for prompt in load_prompts(settings(write(tmp_path / "p.jsonl", rows)), seed=1)[0]}
    assert texts <= {row["prompt"] for row in rows}


def test_control_characters_that_files_and_requests_can_hold_are_text(tmp_path):
    rows = [{"prompt": f"form\x0cfeed \x1b[0m {row}\r\n"} for row in range(9)]
    assert "\x1b[0m" in load_prompts(settings(write(tmp_path / "p.jsonl", rows)), seed=1)[0][0].text


@pytest.mark.parametrize("id_", ["half \ud83d", "nul \0"])
def test_an_id_that_cannot_be_stored_is_named(tmp_path, id_):
    rows = [{"prompt": f"question {row}?", "id": f"{id_}{row}"} for row in range(9)]
    with pytest.raises(PromptError, match=r"row \d of prompts\.source .*: it holds"):
        load_prompts(settings(write(tmp_path / "p.jsonl", rows)), seed=1)


def test_rows_without_an_id_are_numbered(tmp_path):
    source = write_table(tmp_path / "p.parquet", [{"prompt": f"question {row}?", "id": None} for row in range(9)])
    assert {prompt.id for prompt in load_prompts(settings(source), seed=1)[0]} <= {f"row-{row}" for row in range(9)}


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    source = write(tmp_path / "p.jsonl", questions(9))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(load_prompts(settings(source), seed=1)[0]) == 6


def test_a_parquet_row_that_is_not_utf_8_is_named(tmp_path):
    rows = pa.array([b"question %d" % row for row in range(8)] + [b"caf\xe9"], pa.binary())
    texts = pa.StringArray.from_buffers(len(rows), rows.buffers()[1], rows.buffers()[2])
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"row 8 of prompts\.source .* is not UTF-8"):
        load_prompts(settings(tmp_path / "p.parquet"), seed=1)


# --- every text once --------------------------------------------------------------------------------------------------


def test_texts_are_distinct_across_training_validation_and_evaluation(tmp_path):
    rows = [{"prompt": f"Question number {row % 9}?"} for row in range(54)]
    drawn = draw_prompts(settings(write(tmp_path / "p.jsonl", rows)), seed=1)
    texts = [prompt.text for prompt in [*drawn.train, *drawn.evaluation]]
    assert len(set(texts)) == 9
    assert drawn.left_out is not None
    assert re.search(r"case and spaces apart\): \d+ for prompts\.train, \d+ for prompts\.evaluation", drawn.left_out)
    assert draw_prompts(settings(write(tmp_path / "p.jsonl", questions(9))), seed=1).left_out is None


@pytest.mark.parametrize("twin", ["Why is the SKY blue?", " Why  is the\nsky blue? ", "Why is the sky blue\uff1f"])
def test_case_spaces_and_widths_make_no_other_text(tmp_path, twin):
    rows = [
        *[{"prompt": f"question {row}?", "split": "train"} for row in range(5)],
        {"prompt": "Why is the sky blue?", "split": "train"},
        {"prompt": twin, "split": "eval"},
        *[{"prompt": f"unseen {row}?", "split": "eval"} for row in range(3)],
    ]
    drawn = draw_prompts(settings(write(tmp_path / "p.jsonl", rows)), seed=1)
    assert {prompt.text for prompt in drawn.evaluation} == {f"unseen {row}?" for row in range(3)}


@pytest.mark.parametrize(("train", "key"), [(6, "train=6"), (4, "evaluation=3")])
def test_too_few_distinct_texts_are_refused_with_their_number(tmp_path, train, key):
    rows = [{"prompt": f"Question number {row % 4}?"} for row in range(24)]
    with pytest.raises(PromptError, match=rf"only \d prompts for prompts\.{key}.*; \d+ rows repeat the text of"):
        load_prompts(settings(write(tmp_path / "p.jsonl", rows), train=train), seed=1)


# --- dialogues and conversations --------------------------------------------------------------------------------------

DIALOGUE = "\n\nHuman: First {row}?\n\nAssistant: An answer.\n\nHuman: And more?\n\nAssistant: The last answer."
TURNS = [("user", "First {row}?"), ("assistant", "An answer."), ("user", "And more?")]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASKED = [("user", "q"), ("assistant", "a"), ("user", "r")]
PLAY = "a play:\nHuman: hi\nAssistant: ho"


def one_prompt(tmp_path, value, format_):
    source = write(tmp_path / "p.jsonl", [{"prompt": value}, *[{"prompt": value}] * 2])
    return next(loading._draw(settings(source, format=format_), loading._pool(settings(source), "train"), seed=1))[1]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_dialogue_is_asked_up_to_its_last_question(tmp_path, name):
    source = write_table(tmp_path / name, [{"chosen": DIALOGUE.format(row=row)} for row in range(12)])
    train, evaluation = load_prompts(settings(source, field="chosen", format="dialogue"), seed=1)
    for prompt in [*train, *evaluation]:
        row = prompt.id.removeprefix("row-")
        assert prompt.messages == [{"role": role, "content": text.format(row=row)} for role, text in TURNS]
        assert prompt.text == f"First {row}?\n\nAssistant: An answer.\n\nHuman: And more?"
        filled = fill("\n\nHuman: {prompt}\n\nAssistant:{answer}", prompt.text, " The last answer.")
        assert filled == DIALOGUE.format(row=row), "what reward models of such dialogues were trained on"


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: q\n\nAssistant:", [("user", "q")]),
        ("\n\nHuman: q", [("user", "q")]),
        ("Human: q\nAssistant: a\nHuman: r\nAssistant: b", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("\r\n\r\nHuman: q\r\n\r\nAssistant: a", [("user", "q")]),
        (f"\n\nHuman: {PLAY}\n\nAssistant: a", [("user", PLAY)]),
        ("\n\nHuman: q\n\nHuman: r\n\nAssistant: a", [("user", "q\n\nr")]),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: \n\nAssistant: b", [("user", "q")]),
        ("\n\nAssistant: a\n\nHuman: q", [("assistant", "a"), ("user", "q")]),
        ("Human: q\nAssistant: a\n\nHuman: r\nAssistant: b", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("Human: q\n\nAssistant: a\nHuman: r\n\nAssistant: b", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("Human: q\n \n  Assistant: a\n\t\nHuman: r", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("Human: q\r\rAssistant: a", [("user", "q")]),
        ("User: q\n\nAssistant: a\n\nUser: r\n\nAssistant: b", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("human: q\nASSISTANT: a\nHUMAN: r", [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ("System: S\n\nHuman: q\n\nAssistant: a", [("system", "S"), ("user", "q")]),
        ("system: S\nuser: q\nassistant: a\nuser: r", [("system", "S"), *ASKED]),
        ("Human: q\n\nSystem: Linux\n\nUser: root\n\nAssistant: a", [("user", "q\n\nSystem: Linux\n\nUser: root")]),
        ("Human: What does Assistant: mean?\n\nAssistant: a", [("user", "What does Assistant: mean?")]),
        ("Human: AI: friend or foe?\n\nAssistant: a", [("user", "AI: friend or foe?")]),
    ],
)
def test_labels_of_dialogues_divide_them(text, turns):
    assert loading.FORMATS["dialogue"](text) == turns


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [("user", "q")]),
        (SHAREGPT, [("system", "S"), ("user", "q")]),
        ([*SHAREGPT[1:], {"from": "human", "value": "r"}], [("user", "q"), ("assistant", "a"), ("user", "r")]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}],
            [("user", "qr")],
        ),
        ([{"role": "developer", "content": "S"}, {"role": "user", "content": "q"}], [("system", "S"), ("user", "q")]),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}], [("user", "q")]),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant"}, {"role": "tool", "content": 3}, {}],
            [("user", "q")],
        ),
        ([{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}], [("user", "q")]),
        ([{"role": "user", "content": "q"}, {"role": "user", "content": " "}], [("user", "q")]),
        ([{"role": None, "from": "human", "content": None, "value": "q"}], [("user", "q")]),
        ([{"role": "user", "from": None, "content": "q", "value": None}], [("user", "q")]),
    ],
)
def test_conversations_are_lists_of_messages(messages, turns):
    assert loading.FORMATS["conversation"](messages) == turns


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_nested_column_holds_conversations(tmp_path, name):
    asked = [[{"role": "user", "content": f"q{row}"}, {"role": "assistant", "content": "a"}] for row in range(9)]
    source = write_table(tmp_path / name, [{"data": {"messages": messages}} for messages in asked])
    train, _ = load_prompts(settings(source, field="data.messages", format="conversation"), seed=1)
    assert all(prompt.text == f"q{prompt.id.removeprefix('row-')}" and not prompt.turns for prompt in train)


def test_rewards_do_not_read_system_messages(tmp_path):
    prompt = one_prompt(tmp_path, SHAREGPT, "conversation")
    assert prompt.text == "q"
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


def test_other_names_of_answerers_are_text_where_a_dialogue_has_its_answers(tmp_path):
    value = "\n\nHuman: Write a play.\nAI: Hello.\nBot: Bye.\n\nAssistant: a\n\nHuman: Longer!\n\nAssistant: b"
    source = write(
        tmp_path / "p.jsonl", [{"prompt": f"{value}{row}".replace("Longer!", f"Longer {row}!")} for row in range(9)]
    )
    prompt = load_prompts(settings(source, format="dialogue"), seed=1)[0][0]
    assert [role for role, _ in prompt.turns] == ["user", "assistant", "user"]
    assert prompt.turns[0][1] == "Write a play.\nAI: Hello.\nBot: Bye."


@pytest.mark.parametrize(
    ("value", "format_", "words"),
    [
        ("What is this?", "dialogue", "begins with Human:, User:, System: or Assistant:; set prompts.format=text"),
        ("### Human: q\n### Assistant: a", "dialogue", "on a new line: write the labels so"),
        ("H: q\n\nA: a", "dialogue", "on a new line: write the labels so"),
        ("**User:** q\n\n**Assistant:** a", "dialogue", "on a new line: write the labels so"),
        ("Human: q Assistant: a", "dialogue", "a question holds an answer: write Assistant: in front of answers"),
        ("Human: q Assistant: a\n\nHuman: r assistant: b", "dialogue", "a question holds an answer"),
        ("Human: q\n\nAI: a", "dialogue", "a question holds an answer"),
        ("Human: q\n\n### Assistant: a", "dialogue", "a question holds an answer"),
        ("Human: q\nAssistant: a\n\nAssistant: b", "dialogue", "a question holds an answer"),
        (SHAREGPT, "dialogue", "begins with Human:"),
        ("\n\nHuman: \n\nAssistant: a", "dialogue", "there is no question"),
        ("\n\nAssistant: a", "dialogue", "there is no question"),
        ("\n\nHuman: q \ud83d\n\nAssistant: a", "dialogue", "half of a surrogate pair"),
        ("What is this?", "conversation", "a list of messages; set prompts.format to text or dialogue"),
        (["What is this?"], "conversation", "a list of messages"),
        (json.dumps(SHAREGPT), "conversation", "a text that holds JSON: write the list itself into the column"),
        ({"messages": SHAREGPT}, "conversation", "an object that holds one: add .messages to prompts.field"),
        ({"id": 3, "turns": SHAREGPT}, "conversation", "add .turns to prompts.field"),
        ({"role": ["user"], "content": ["q"]}, "conversation", "a list of messages; set prompts.format"),
        ([{"role": "tool", "content": "a"}, *SHAREGPT], "conversation", "the role 'tool'"),
        ([{"role": "assistant", "content": None}, *SHAREGPT], "conversation", "the assistant message has no text"),
        ([], "conversation", "there is no question"),
        ([{"role": "assistant", "content": "a"}], "conversation", "there is no question"),
        ([{"role": "tool", "content": "a"}], "conversation", "the role 'tool': use system, user or assistant"),
        ([{"speaker": "me", "content": "a"}], "conversation", "the role None"),
        ([{"role": "user", "content": None}], "conversation", "the user message has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "conversation", "the user message has no text"),
        ([{"role": "user", "content": "a\0"}], "conversation", "a NUL character"),
    ],
)
def test_what_is_no_dialogue_or_conversation_is_named(tmp_path, value, format_, words):
    with pytest.raises(PromptError, match=r"row \d of prompts\.source") as caught:
        one_prompt(tmp_path, value, format_)
    assert words in str(caught.value)


def test_a_deep_object_is_a_column_like_any_other():
    deep = {}
    for _ in range(5000):  # more than Python recurses; newer versions of it parse such JSON
        deep = {"a": deep}
    assert loading._columns([{"prompt": "q", "extra": deep}])[:3] == ["prompt", "extra", "extra.a"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_dotted_names_reach_into_columns(tmp_path, name):
    rows = [{"info": {"post": f"post {row}", "by": {"name": f"name {row}"}}, "summary": "s"} for row in range(9)]
    source = write_table(tmp_path / name, rows)
    for field, word in (("info.post", "post"), ("info.by.name", "name")):
        train, _ = load_prompts(settings(source, field=field), seed=1)
        assert all(prompt.text == f"{word} {prompt.id.removeprefix('row-')}" for prompt in train)
    with pytest.raises(PromptError, match=r"no column 'info\.title': set prompts\.field to one of info, info\.post"):
        load_prompts(settings(source, field="info.title"), seed=1)


def test_a_column_may_have_a_dot_in_its_name(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"info.post": f"post {row}"} for row in range(9)])
    assert load_prompts(settings(source, field="info.post"), seed=1)[0][0].text.startswith("post")


@pytest.mark.parametrize("row", [{"a.b": {"c": "q"}}, {"a": {"b.c": "q"}}, {"a": {"x": 1}, "a.b": {"c": "q"}}])
@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_dot_may_be_part_of_a_name_or_between_two(tmp_path, row, name):
    source = write_table(tmp_path / name, [row] * 9)
    pool = loading._pool(settings(source, field="a.b.c"), "train")
    assert {loading._value(pool.table[number], "a.b.c") for number in pool.numbers} == {"q"}


def config_with(name, source):
    """The prompts section of a shipped config, with another source and few prompts."""
    section = config_module.load(ROOT / "jobs/configs" / name).prompts
    return section.model_copy(update={"source": str(source), "train": 6, "validation": 1, "evaluation": 3})


def test_the_config_of_hh_rlhf_fits_its_rows(tmp_path):
    folder = tmp_path / "hh"
    folder.mkdir()
    for split in ("train", "test"):
        dialogues = [DIALOGUE.format(row=f"{split} {row}") for row in range(9)]
        write(folder / f"{split}.jsonl", [{"chosen": text, "rejected": f"{text} Not."} for text in dialogues])
    train, evaluation = load_prompts(config_with("hh_rlhf.yaml", folder), seed=1)
    assert all(prompt.messages[-1]["content"] == "And more?" for prompt in train)
    assert all(prompt.text.startswith("First test") for prompt in evaluation)


def test_the_config_of_summaries_fits_its_rows(tmp_path):
    """Several comparisons of one post, in the table that the hub makes of the data set."""
    summaries = [{"text": "a", "policy": "ref", "note": None}, {"text": "b", "policy": "sup2", "note": None}]
    common = {"summaries": summaries, "choice": 1, "worker": "w", "batch": "batch3", "split": "train"}
    info = {"title": "t", "subreddit": "AskReddit", "site": None, "article": None}
    rows = [
        {"info": {"id": f"t3_{row // 2}", "post": f"post {row // 2}", **info}, **common, "extra": {"confidence": row}}
        for row in range(18)
    ]
    train, evaluation = load_prompts(config_with("summarize.yaml", write_table(tmp_path / "c.parquet", rows)), seed=1)
    assert {prompt.text for prompt in [*train, *evaluation]} == {f"post {row}" for row in range(9)}


def test_a_data_set_that_is_a_script_is_refused(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit")
    with pytest.raises(PromptError, match=r"cannot be read .*script"):
        load_prompts(settings(folder), seed=1)
