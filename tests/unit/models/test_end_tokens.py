"""An answer ends with any token that anything in the model's directory names as its end."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decode import gguf_files
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.models.directory import ModelError, read_tokenizer
from mavis_dist.models.end_tokens import describe_disagreement, end_sources
from mavis_dist.models.load import fingerprint_tokenizer, load_base, load_skeleton, load_tokenizer
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


def write_end(model: Path, special: bool, as_eos: bool = True, in_template: bool = True, **settings: bool) -> None:
    """Make <|im_end|> the token END of the tokenizer."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    del vocabulary[next(token for token, id_ in vocabulary.items() if id_ == END)]
    vocabulary["<|im_end|>"] = END
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
        **settings,
    }
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
    assert base.tokenizer_fingerprint == load_skeleton(str(model)).tokenizer_fingerprint == fingerprint_tokenizer(model)
    assert tokenizer("<|im_end|>")["input_ids"] == [END]


def test_ordinary_tokens_that_end_answers_stay_text(model: Path) -> None:
    """Such as the line break of models that write one line."""
    change(model / "generation_config.json", eos_token_id=[1, 40])
    base = load_base(str(model))
    assert base.eos_ids == (1, 40)
    plain = read_tokenizer(model)
    assert base.tokenizer.decode([5, 40], skip_special_tokens=True) == plain.decode([5, 40])


@pytest.mark.parametrize(
    "settings", [{"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True}, {"normalized": False}]
)
def test_marking_an_end_changes_no_encoding(model: Path, settings: dict[str, bool]) -> None:
    write_end(model, False, as_eos=False, **settings)
    plain, marked = read_tokenizer(model), load_tokenizer(str(model))
    token = marked.added_tokens_decoder[END]
    assert token.special
    assert all(getattr(token, name) == value for name, value in settings.items())
    for text in ("a<|im_end|>\nb", "a <|im_end|> b", "a<|im_end|>b", "<|im_end|>"):
        assert marked(text)["input_ids"] == plain(text)["input_ids"]


def test_a_fingerprint_does_not_depend_on_which_files_name_an_end(model: Path) -> None:
    """Value models stay valid when somebody corrects the ends of answers."""
    write_end(model, False, as_eos=False, in_template=False)
    before = load_base(str(model)).tokenizer_fingerprint
    change(model / "generation_config.json", eos_token_id=[1, END])
    after = load_base(str(model))
    assert after.eos_ids == (1, END)
    assert after.tokenizer.added_tokens_decoder[END].special
    assert after.tokenizer_fingerprint == before


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([7, 3], END, (3, 7, END, 1)),
        (None, END, (END, 1)),
        (None, None, (1,)),
        (-1, [END], (END, 1)),
        (True, 10**6, (1,)),
        ([7], [7, 3], (7, 1)),
    ],
)
def test_every_file_counts_with_what_it_states(model: Path, generation, config, expected) -> None:
    write_end(model, True, as_eos=False, in_template=False)
    change(model / "generation_config.json", _from_model_config=None)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        change(model / name, eos_token_id=value)
    assert load_base(str(model)).eos_ids == expected


def test_the_text_model_within_a_model_counts(model: Path) -> None:
    write_end(model, True, as_eos=False, in_template=False)
    change(model / "config.json", text_config={"eos_token_id": [END]})
    assert end_sources(model, load_tokenizer(str(model)))["config.json"] == {1, END}


def write_without_eos(model: Path) -> None:
    """A model whose author left the end of an answer to the class: its default, 2, is an ordinary token here."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((model / name).read_text())["eos_token_id"] == 2, "what makes this test see anything"


@pytest.mark.parametrize("file", [None, "config.json", "generation_config.json"])
def test_the_default_of_a_class_ends_no_answer(model: Path, file: str | None) -> None:
    write_without_eos(model)
    if file:
        change(model / file, eos_token_id=None)
    base = load_base(str(model))
    assert base.eos_ids == (1,)
    line = describe_disagreement(model, base.tokenizer)
    assert line is not None
    assert "any of these tokens ends an answer: '</s>' (1: tokenizer); not the ordinary '!' (2: " in line


def test_an_ordinary_end_counts_if_another_source_names_it_or_none_names_an_added_one(model: Path) -> None:
    write_without_eos(model)
    change(model / "generation_config.json", _from_model_config=None)
    assert load_base(str(model)).eos_ids == (2, 1)
    write_without_eos(model)
    change(model / "tokenizer_config.json", eos_token=None)
    assert load_base(str(model)).eos_ids == (2,)


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
