"""An answer ends with any token that anything in the model's directory names as its end."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from benchmarks.decode import gguf_files
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.models.directory import ModelError, read_tokenizer
from mavis_dist.models.end_tokens import describe_disagreement, end_sources
from mavis_dist.models.load import fingerprint_tokenizer, load_base, load_tokenizer
from tests.tiny import write_base

CHATML = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>\n{% endfor %}"
END = 60  # an ordinary token that plays <|im_end|>, so that the tiny model has a row for it


def change(file: Path, **keys: object) -> None:
    """Set keys of a JSON file, or remove those that are None."""
    config = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chat model on the base of another: generation_config and config name its `</s>`, nothing else."""
    return write_base(tmp_path, eos_weight=1.0)


def write_end(model: Path, special: bool, as_eos: bool = True, in_template: bool = True) -> None:
    """Make <|im_end|> the token END of the tokenizer."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    del vocabulary[next(token for token, id_ in vocabulary.items() if id_ == END)]
    vocabulary["<|im_end|>"] = END
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    content["added_tokens"].append({"id": END, "content": "<|im_end|>", **flags})
    file.write_text(json.dumps(content))
    if as_eos:
        change(model / "tokenizer_config.json", eos_token="<|im_end|>")
    if in_template:
        (model / "chat_template.jinja").write_text(CHATML)


def test_sources_that_agree_are_one(model: Path) -> None:
    base = load_base(str(model))
    assert base.eos_ids == (1,)
    assert describe_disagreement(model, base.tokenizer) is None


@pytest.mark.parametrize(("as_eos", "in_template"), [(True, False), (False, True), (True, True)])
def test_the_tokenizer_and_the_template_are_asked_too(model: Path, as_eos: bool, in_template: bool) -> None:
    write_end(model, True, as_eos, in_template)
    base = load_base(str(model))
    assert base.eos_ids == (1, END)
    line = describe_disagreement(model, base.tokenizer)
    assert line is not None
    named = ", ".join(["tokenizer"] * as_eos + ["chat template"] * in_template)
    assert "'</s>' (1: generation_config.json, config.json" in line
    assert f"'<|im_end|>' ({END}: {named})" in line


def test_an_answer_ends_with_any_of_them(model: Path) -> None:
    """A model that writes its own end of turn, which generation_config does not know."""
    write_end(model, True)
    base = load_base(str(model))
    with torch.no_grad():
        base.model.lm_head.weight[END] = 3 * base.model.lm_head.weight[5]
    choices = Engine(base).generate([Request("r", base.chat("Hello"), params=SamplingParams(64, n=16, seed=0))])[0]
    ended = [choice for choice in choices if choice.tokens[-1] == END]
    assert ended
    assert all(choice.finish is not None and choice.finish.value == "stop" for choice in ended)
    assert not any(END in choice.tokens[:-1] for choice in choices)
    assert not any("im_end" in choice.text for choice in choices)


def test_an_end_that_is_not_marked_as_special_is_no_text_either(model: Path) -> None:
    write_end(model, False)
    base = load_base(str(model))
    assert base.eos_ids == (1, END)
    for tokenizer in (base.tokenizer, load_tokenizer(str(model))):
        assert tokenizer.decode([5, 6, END], skip_special_tokens=True) == tokenizer.decode([5, 6])
        assert tokenizer.batch_decode([[5, END]], skip_special_tokens=True) == [tokenizer.decode([5])]
        assert fingerprint_tokenizer(tokenizer) == base.tokenizer_fingerprint
    assert tokenizer("<|im_end|>")["input_ids"] == [END]


def test_ordinary_tokens_that_end_answers_stay_text(model: Path) -> None:
    """Such as the line break of models that write one line."""
    change(model / "generation_config.json", eos_token_id=[1, 40])
    base = load_base(str(model))
    assert base.eos_ids == (1, 40)
    plain = read_tokenizer(model)
    assert base.tokenizer.decode([5, 40], skip_special_tokens=True) == plain.decode([5, 40])
    assert base.tokenizer_fingerprint == fingerprint_tokenizer(plain)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([7, 3], 5, (3, 7, 5, 1)),
        (None, 5, (5, 1)),
        (None, None, (1,)),  # not the default of the class, which is an ordinary token here
        (-1, [4], (4, 1)),
        (True, 10**6, (1,)),
    ],
)
def test_every_file_counts_with_what_it_states(model: Path, generation, config, expected) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        change(model / name, eos_token_id=value)
    assert load_base(str(model)).eos_ids == expected


def test_the_text_model_within_a_model_counts(model: Path) -> None:
    change(model / "config.json", text_config={"eos_token_id": [9]})
    assert end_sources(model, load_tokenizer(str(model)))["config.json"] == {1, 9}


def test_a_model_that_names_no_end_is_refused(model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        change(model / name, eos_token_id=None)
    change(model / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"no eos_token_id within its vocabulary of 100 \(none at all\)"):
        load_base(str(model))
    change(model / "generation_config.json", eos_token_id=5000)
    with pytest.raises(ModelError, match=r"\(\[5000\] in generation_config\.json\)"):
        load_base(str(model))


def test_a_gguf_file_may_name_the_ends_of_turns_and_messages(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAVIS_CACHE", str(tmp_path / "cache"))
    config = {"rope_parameters": {"rope_theta": 1e4}, **json.loads((model / "config.json").read_text())}
    vocabulary = load_tokenizer(str(model)).get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)[:-1], "ab"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    gguf_files._add_config(writer, config)
    writer.kv_data[0].pop("tokenizer.ggml.model")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(8)
    writer.add_eom_token_id(9)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in gguf_files._weights(model, config):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_base(str(tmp_path / "m.gguf")).eos_ids == (1, 8, 9)
