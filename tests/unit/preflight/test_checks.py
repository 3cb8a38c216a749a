"""What the checks before a run find, without weights, a cluster or a GPU."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.models.architectures import tiny_model
from jobs import check as job
from mavis_dist.config import Config, parse
from mavis_dist.environment import versions
from mavis_dist.models.load import load_base, load_skeleton
from mavis_dist.models.value import from_base
from mavis_dist.preflight import describe, machine
from mavis_dist.preflight.checks import check, check_base, check_value
from mavis_dist.preflight.machine import (
    check_machine,
    check_packages,
    check_rewards,
    check_server,
    local_fingerprints,
)
from mavis_dist.store import files, layout
from mavis_dist.store.files import Store
from mavis_dist.types import UserError
from tests.tiny import make_tokenizer, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), eos_weight=1.0)


def config(base: Path, /, **settings: Any) -> Config:
    given = {
        "run": "r",
        "storage": str(base.parent / "runs"),
        "objectives": {"vowels": {"reward": "function", "path": "tests.tiny:count_vowels"}},
        "base": {"model": str(base), "dtype": "float32"},
        "value": {"layers": 1},
        "prompts": {"train": 8, "validation": 2, "evaluation": 4},
    }
    return parse({**given, **settings})


def write_other(folder: Path, model_type: str, **settings: Any) -> Path:
    """A tiny model of another architecture, with the tokenizer of the base model."""
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_skeleton_is_the_base_model_without_weights(base: Path) -> None:
    whole, skeleton = load_base(str(base)), load_skeleton(str(base))
    assert skeleton.model.device == torch.device("meta")
    assert skeleton.model.num_parameters() == whole.model.num_parameters()
    for name in ("eos_ids", "max_context", "name", "tokenizer_fingerprint"):
        assert getattr(skeleton, name) == getattr(whole, name)
    assert skeleton.chat("How?") == whole.chat("How?")


@pytest.mark.parametrize("value", [{"layers": 1}, {"kind": "shared", "layers": 2}, {"kind": "states"}])
def test_a_good_config_passes_and_is_described(base: Path, value: dict[str, Any]) -> None:
    told: dict[str, str] = {}
    findings = check(config(base, value=value), told.__setitem__)
    assert (len(findings.prompts.train), len(findings.prompts.evaluation)) == (8, 4)
    assert findings.rewards["vowels"].spread > 0
    assert "llama, 2 layers" in told["model"]
    assert "QUESTION" in told["template"]
    assert told["ends answers"] == "1 '</s>'"
    assert told["windows"] == "none"
    assert told["system"] == "a turn of its own"
    assert "6 to train, 2 to validate, 4 to evaluate from builtin" in told["prompts"]
    assert "1024" in told["prompts"]
    assert "function (path tests.tiny:count_vowels): " in told["reward vowels"]
    assert "GiB per rollout actor" in told["memory"]


def test_the_skeleton_of_a_value_model_is_the_model_that_is_trained(base: Path) -> None:
    skeleton, whole = from_base(base, 1, 2, has_weights=False), from_base(base, 1, 2)
    assert {name: x.shape for name, x in skeleton.state_dict().items()} == {
        name: x.shape for name, x in whole.state_dict().items()
    }
    assert skeleton.backbone.config._attn_implementation == whole.backbone.config._attn_implementation


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("model_type", ["mistral", "qwen2_moe", "gpt_neox"])
def test_architectures_that_can_be_trained_pass_without_weights(base: Path, tmp_path: Path, model_type: str) -> None:
    other = write_other(tmp_path / "other", model_type, num_hidden_layers=2, **SMALL)
    model = check_value(config(base, value={"backbone": str(other), "layers": 1}), load_skeleton(str(base)))
    assert model.backbone.config.model_type == model_type


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"layers": 3}, "value.layers is 3 but .* has 2 layers: use at most 2"),
        ({"kind": "states", "layers": 9}, "value.layers is 9 but the base model has 2"),
        ({"backbone": "/no/such/model"}, "'/no/such/model' does not exist"),
    ],
)
def test_a_value_model_that_cannot_be_made_is_refused(base: Path, value: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check(config(base, value=value))


def test_a_backbone_that_fails_in_its_first_pass_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    plain = LlamaModel.forward

    def forward(self: Any, position_ids: Any = None, **inputs: Any) -> Any:
        if position_ids is not None:
            raise ValueError("this attention takes\nno such mask")
        return plain(self, **inputs)

    made = config(base)
    skeleton = check_base(made)
    check_value(made, skeleton)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(
        UserError, match=r"a model of type 'llama' .* fails on a tree .*this attention takes no such mask"
    ):
        check_value(made, skeleton)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_a_backbone_that_lacks_weights_is_refused(base: Path, tmp_path: Path, model_type: str) -> None:
    other = write_other(tmp_path / "other", model_type, num_hidden_layers=2, **SMALL)
    made, skeleton = config(base, value={"backbone": str(other), "layers": 1}), load_skeleton(str(base))
    weights = load_file(other / "model.safetensors")
    lost = "model.layers.1.self_attn.o_proj.weight"
    save_file({k: x for k, x in weights.items() if k != lost}, other / "model.safetensors", {"format": "pt"})
    check_value(made, skeleton)  # of a layer that is not used
    lost = lost.replace("1", "0")
    save_file({k: x for k, x in weights.items() if k != lost}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"value.backbone .* lacks the weights layers\.0\.self_attn\.o_proj\.weight"):
        check_value(made, skeleton)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
        ("t5", {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}),
    ],
)
def test_the_architecture_of_a_backbone_is_judged_before_its_context(
    base: Path, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer()
    shape = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), decoder_start_token_id=0, **settings)
    shape.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=rf"value\.backbone .*{model_type}' cannot be decoded here"):
        check(config(base, value={"backbone": str(tmp_path / "other"), "layers": 1}))


def test_code_of_a_backbone_is_never_run(base: Path, tmp_path: Path) -> None:
    """Not even asked about: a prompt for it would wait for an answer in a job."""
    other = write_other(tmp_path / "other", "llama", num_hidden_layers=1, **SMALL)
    settings = json.loads((other / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (other / "config.json").write_text(json.dumps({**settings, **own}))
    (other / "own.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"value\.backbone .*cannot be loaded"):
        check_value(config(base, value={"backbone": str(other)}), load_skeleton(str(base)))


def test_a_backbone_whose_tokens_have_other_ids_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_other(tmp_path / "other", "llama", num_hidden_layers=1, **SMALL)
    made, skeleton = config(base, value={"backbone": str(other), "layers": 1}), load_skeleton(str(base))
    check_value(made, skeleton)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"value\.backbone .* has token 'A' at id 35, and the base model's .* at 34"):
        check_value(made, skeleton)
    for part in other.glob("tokenizer*"):
        part.unlink()
    check_value(made, skeleton)  # nothing to compare


def test_a_model_that_projects_its_states_has_heads_of_their_width(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    opt = write_other(tmp_path / "opt", "opt", num_hidden_layers=2, **shape)
    made = config(opt)
    assert check_value(made, check_base(made)).heads.in_features == 16
    assert from_base(opt, 1)(input_ids=torch.tensor([[3, 4, 5]])).shape == (1, 3, 1)
    with pytest.raises(UserError, match=r"choose another base model, or value\.kind=model"):
        check(config(opt, value={"kind": "states"}))


def test_layers_that_do_not_work_without_the_others_are_refused_for_heads_on_states(base: Path) -> None:
    made, skeleton = config(base, value={"kind": "states"}), load_skeleton(str(base))
    check_value(made, skeleton)
    with pytest.raises(UserError, match=r"first layers of base\.model .* do not work on their own .*value\.kind=model"):
        check_value(made, replace(skeleton, model=cast(Any, tiny_model("gemma4_text"))))


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_unified_text", "hrm_text", "opt"])
def test_every_model_that_can_be_used_is_described(base: Path, name: str) -> None:
    model: Any = tiny_model(name)
    told = describe.token_bytes(replace(load_skeleton(str(base)), model=model), 4)
    tokens = torch.arange(3, 8)[None]
    layers = model(tokens, use_cache=True).past_key_values.layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers if layer.is_initialized)
    assert told == 4 * cached / tokens.numel()


def test_a_run_does_without_descriptions(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such attribute")

    monkeypatch.setattr(describe, "token_bytes", fails)
    check(config(base))
    with pytest.raises(RuntimeError):
        check(config(base), lambda topic, text: None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral", "2 layers: sliding attention of 6 tokens"),
        ("qwen2", "1 layers: sliding attention of 6 tokens, 1 layers full"),
        ("llama4_text", "2 layers: chunked attention of 6 tokens"),
        ("llama4_text, chunks in one layer", "1 layers: chunked attention of 6 tokens, 1 layers full"),
        ("lfm2", "none"),
        ("llama, a window in its config only", "none"),
    ],
)
def test_windows_are_told_as_they_take_effect(name: str, text: str) -> None:
    assert describe.windows(tiny_model(name)) == text


def test_a_backbone_with_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_other(tmp_path / "other", "llama", num_hidden_layers=1, **SMALL)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "vocab_size": 7}))
    with pytest.raises(UserError, match="knows 7 tokens, but the base model's tokenizer has"):
        check(config(base, value={"backbone": str(other), "layers": 1}))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"base": {"model": "/no/such/model"}}, "'/no/such/model' does not exist"),
        ({"objectives": {"x": {"reward": "function", "path": "tests.tiny:nothing"}}}, "no such name"),
        ({"objectives": {"x": {"reward": "relevance", "model": "/no/embedder"}}}, "'/no/embedder' does not exist"),
        ({"prompts": {"train": 10**6}}, "1000000"),
    ],
)
def test_the_first_problem_is_one_line(base: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        check(config(base, **settings))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "xla:1", "cuda:x"])
def test_an_unknown_device_is_refused(base: Path, device: str) -> None:
    with pytest.raises(UserError, match=rf"'base.device' is '{device}' .*: use cpu or cuda"):
        check(config(base, base={"model": str(base), "device": device}))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_a_device_that_another_machine_may_have_passes(base: Path, device: str) -> None:
    check_base(config(base, base={"model": str(base), "device": device}))


def test_a_base_model_that_so_many_processes_cannot_share_is_refused(base: Path) -> None:
    with pytest.raises(
        UserError, match=r"'base.tensor_parallel' is 3: .* 4 attention heads and 2 key-value heads: use 1 or 2"
    ):
        check(config(base, base={"model": str(base), "tensor_parallel": 3}))
    check_base(config(base, base={"model": str(base), "tensor_parallel": 2}))


@pytest.fixture
def made(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a run in an empty storage, whose files are not waited for long."""
    monkeypatch.setattr(files, "LATE_S", 0.1)
    return config(base, storage=str(tmp_path / "runs"))


def test_a_machine_that_sees_another_storage_or_lacks_a_model_is_named(base: Path, made: Config) -> None:
    store = Store(made.storage, made.run)
    with store.probe() as probe:
        check_machine(made, probe, versions(), {})
        with pytest.raises(UserError, match=r"is another folder on machine .* than on the driver's"):
            check_machine(made, "of-another-storage", versions(), {})
        with pytest.raises(
            UserError, match=r"machine .* has torch .*, and the driver's machine 1\.0: install the same"
        ):
            check_machine(made, probe, {**versions(), "torch": "1.0"}, {})
        lacking = config(base, storage=made.storage, value={"backbone": "/only/there"})
        with pytest.raises(UserError, match=r"'value.backbone' is '/only/there', which machine .* does not have"):
            check_machine(lacking, probe, versions(), {})
    assert not os.path.exists(store.root)
    check_rewards(made, ["How?"])
    broken = {"x": {"reward": "function", "path": "not_on_this_machine:score"}}
    with pytest.raises(UserError, match=r"on machine .*: reward function .* cannot be imported"):
        check_rewards(config(base, objectives=broken), ["How?"])


def test_a_machine_with_another_model_at_the_same_path_is_named(base: Path, tmp_path: Path) -> None:
    made = config(base, storage=str(tmp_path / "runs"), value={"backbone": str(base)})
    own = local_fingerprints(made)
    assert list(own) == ["value.backbone"]
    with Store(made.storage, made.run).probe() as probe:
        check_machine(made, probe, versions(), own)
        with pytest.raises(UserError, match=r"key 'value.backbone' is another one on machine .*: put the same"):
            check_machine(made, probe, versions(), {"value.backbone": "that of the driver"})


def test_a_machine_that_cannot_serve_a_run_is_named(base: Path, made: Config) -> None:
    with pytest.raises(UserError, match=r"is another folder on machine .* than on the driver's"):
        check_server(made, ["brief"], versions())
    Store(made.storage, made.run).write_json(layout.published_file("brief"), {"iteration": 0})
    check_server(made, ["brief"], versions())
    with pytest.raises(UserError, match=r"has transformers .*, and the driver's machine 1\.0"):
        check_server(made, ["brief"], {**versions(), "transformers": "1.0"})
    lacking = config(base, storage=made.storage, base={"model": "/only/there"})
    with pytest.raises(UserError, match=r"'base.model' is '/only/there', which machine .* does not have"):
        check_server(lacking, ["brief"], versions())


@pytest.mark.parametrize(("package", "value"), [("deepspeed", {"layers": 1}), ("peft", {"layers": 1, "lora_rank": 2})])
def test_a_package_that_training_lacks_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, package: str, value: dict[str, Any]
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == package else find_spec(name))
    made, heads = config(base, value=value), config(base, value={"kind": "states"})
    for try_it in (check, lambda config: check_machine(config, "probe", versions(), {})):
        with pytest.raises(UserError, match=rf"{package} is not installed on machine .*mavis-dist\[train\]"):
            try_it(made)
    check_packages(heads)


def test_a_reward_of_the_runs_own_prompts_is_tried_on_them(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set[str]()

    def score(prompts: list[str], answers: list[str]) -> list[float]:
        known.update(prompts)
        return [float(len(answer)) for answer in answers]

    monkeypatch.setattr("tests.tiny.count_vowels", score)
    drawn = check(config(base)).prompts
    assert known == {drawn.train[0].text, drawn.evaluation[0].text}


def test_equal_scores_are_noted_once(base: Path) -> None:
    told = list[tuple[str, str]]()
    objectives = {"x": {"reward": "function", "path": "tests.tiny:always_one"}}
    findings = check(config(base, objectives=objectives), lambda topic, text: told.append((topic, text)))
    [note] = [note for note in findings.notes if "have the same score" in note[1]]
    assert told.count(note) == 1


def test_the_job_prints_what_would_be_used_and_ends_at_the_first_problem(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config(base, storage=str(tmp_path / "runs")).model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["check", "--config", str(file)])
    job.main()
    topics = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert topics[:3] == ["storage", "model", "template"]
    assert topics[-1].startswith("reward vowels")
    assert not (tmp_path / "runs" / "r").exists()

    monkeypatch.setattr("sys.argv", ["check", "--config", str(file), "objectives.vowels.path=tests.tiny:nothing"])
    with pytest.raises(SystemExit) as end:
        job.main()
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert "prompts" in printed.out
    assert printed.err.startswith("error: reward function 'tests.tiny:nothing' is not callable")
    assert len(printed.err.splitlines()) == 1
