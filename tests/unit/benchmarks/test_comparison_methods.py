"""Trained policies as methods of a comparison, on a tiny model with random adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.comparison import train
from benchmarks.comparison.decode import MixtureDecoder
from benchmarks.comparison.load import load_merged
from benchmarks.comparison.methods import Policies
from benchmarks.comparison.policies import DPO, KLS, RL, PolicySpec, Settings, marker, policy
from mavis_dist.compare.cells import Weights, plan_cells
from mavis_dist.compare.guides import tree_tokens
from mavis_dist.compare.method import Answer, Training, make_methods
from mavis_dist.compare.results import TrainingCost
from mavis_dist.compare.run import training_of
from mavis_dist.compare.sampling import Base
from mavis_dist.compare.workspace import Workspace
from mavis_dist.config import Config
from mavis_dist.evaluate.collect import record_stage
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, UserError
from tests import tiny
from tests.training.stored import store_trees

NAMES = ("a", "b", "c")
PROMPTS = [Prompt(f"p{i}", f"question {i}?") for i in range(4)]
CORNER, MIXED = {"a": 1.0}, {"a": 0.25, "b": 0.75}
STEM = "model.layers.0.self_attn.q_proj"
SPECS = [
    *(policy(kind, {name: 1.0}, KLS[kind]) for kind in (RL, DPO) for name in NAMES),
    *(
        policy(RL, dict(zip(pair, (share, 1 - share), strict=True)), KLS[RL])
        for pair in ("ab", "ac", "bc")
        for share in (0.25, 0.5)
    ),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("policies")
    base = load_base(str(tiny.write_base(folder, eos_weight=1.0)))
    config = Config(
        run="run",
        storage=str(folder / "runs"),
        objectives={name: {"reward": "brevity"} for name in NAMES},
        base={"model": str(folder / tiny.MODEL), "dtype": "float32"},
        rollout={"max_tokens": 12, "rows": 3, "cpus_per_actor": 1},
        compare={"weights": 5},
    )
    for seed, spec in enumerate(SPECS):
        store_policy(folder / spec.name, Store(config.storage, config.run), spec, base, seed)
    return config


def store_policy(work: Path, store: Store, spec: PolicySpec, base: BaseModel, seed: int) -> None:
    """A random adapter that took 10 seconds to train."""
    source = torch.Generator().manual_seed(seed)
    outputs, inputs = base.model.get_parameter(f"{STEM}.weight").shape
    shapes = {"A": (2, inputs), "B": (outputs, 2)}
    tensors = {
        f"base_model.model.{STEM}.lora_{part}.weight": torch.randn(shape, generator=source)
        for part, shape in shapes.items()
    }
    usage = {"tokens": 1, "seconds": 10.0}
    work.mkdir()
    save_file(tensors, work / "adapter_model.safetensors")
    (work / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    store.upload(work, spec.folder, marker(spec, Settings(), base.fingerprint, "one processor", usage))


@pytest.fixture(scope="module")
def workspace(config: Config) -> Workspace:
    return Workspace(config)


def make(workspace: Workspace, kind: str, **settings: Any) -> Policies:
    methods = {"trained": {"method": f"benchmarks.comparison.methods:{kind}", **settings}}
    compare = workspace.config.compare.model_copy(update={"methods": methods})
    made = make_methods(compare, workspace)["trained"]
    assert isinstance(made, Policies)
    return made


def make_morlhf(workspace: Workspace, **settings: Any) -> Policies:
    return make(workspace, "Morlhf", **{"pair_weights": [0.25, 0.5], **settings})


def spent(answers: list[Answer]) -> float:
    assert all(answer.divergence is not None for answer in answers)
    return sum(answer.divergence or 0.0 for answer in answers)


def test_all_are_the_same_policy_where_one_objective_has_all_the_weight(workspace: Workspace) -> None:
    soups, mod = make(workspace, "Soups"), make(workspace, "Mod")
    expected = soups.answer(PROMPTS, CORNER, 1.0, 0)
    for method in (mod, make_morlhf(workspace)):
        found = method.answer(PROMPTS, CORNER, 1.0, 0)
        assert [answer.text for answer in found] == [answer.text for answer in expected]
        assert [answer.divergence for answer in found] == pytest.approx([answer.divergence for answer in expected])
    assert spent(expected) > 0
    assert [a.text for a in soups.answer(PROMPTS, CORNER, 1.0, 1)] != [a.text for a in expected]
    for answer in expected:
        assert answer.generated == answer.num_tokens > 0
        assert answer.reward_calls == 0
        assert answer.seconds > 0


def test_soups_merge_weights_and_mod_mixes_log_probabilities(config: Config, workspace: Workspace) -> None:
    store = Store(config.storage, config.run)
    names = ["rl-a-kl0.2", "rl-b-kl0.2"]
    merged = load_merged(config, store, dict(zip(names, MIXED.values(), strict=True)), 0.5)
    alone = [load_merged(config, store, {name: 1.0}) for name in names]
    requests = workspace.requests(PROMPTS, 0)
    soup = MixtureDecoder(workspace.base, [merged]).answer(requests)
    mixture = MixtureDecoder(workspace.base, alone).answer(requests, list(MIXED.values()), 0.5)
    for kind, choices in (("Soups", soup), ("Mod", mixture)):
        found = make(workspace, kind).answer(PROMPTS, MIXED, 0.5, 0)
        assert [answer.text for answer in found] == [choice.text for choice in choices]
        assert [answer.divergence for answer in found] == pytest.approx([choice.divergence for choice in choices])
    exact = make_morlhf(workspace).answer(PROMPTS, MIXED, 1.0, 0)
    alone = [load_merged(config, store, {"morlhf-a0.25-b0.75-kl0.2": 1.0})]
    assert [a.text for a in exact] == [c.text for c in MixtureDecoder(workspace.base, alone).answer(requests)]


@pytest.mark.parametrize("kind", ["Soups", "Mod", "Morlhf", "DpoSoups", "DpoMod"])
def test_a_vanishing_strength_is_the_base_model(workspace: Workspace, kind: str) -> None:
    method = make_morlhf(workspace) if kind == "Morlhf" else make(workspace, kind)
    found, base = method.answer(PROMPTS, MIXED, 1e-9, 0), Base(workspace, {}).answer(PROMPTS, {}, 0.0, 0)
    assert [answer.text for answer in found] == [answer.text for answer in base]
    assert spent(found) == pytest.approx(0.0, abs=1e-6)


def test_tokens_of_trees_are_counted(workspace: Workspace, tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run")
    assert tree_tokens(store, "base") == 0
    trees = store_trees(store, workspace.base, 2)
    assert tree_tokens(store, "base") == sum(len(tree.tokens) for tree in trees) > 0


def test_inputs_are_the_policies_and_training_is_theirs(workspace: Workspace) -> None:
    rl, dpo, exact = make(workspace, "Soups"), make(workspace, "DpoSoups"), make_morlhf(workspace)
    assert rl.inputs()["policies"].keys() == {f"rl-{name}-kl0.2" for name in NAMES}
    assert rl.inputs() == make(workspace, "Mod").inputs() != dpo.inputs()
    assert len(set(rl.inputs()["policies"].values())) == 3
    machines = frozenset({"one processor"})
    assert rl.training() == Training(30.0, 3, machines)
    assert dpo.training() == replace(rl.training(), tokens=3 + tree_tokens(workspace.store, "base"))
    record_stage(workspace.store, "rollouts i0", 100.0, "")
    assert (rl.training().seconds, dpo.training().seconds) == (30.0, 130.0)
    assert exact.training() == Training(10.0 * (3 + 2 * 3), 9, machines)
    vectors = [(("a", 1.0),), (("a", 0.25), ("b", 0.75))]
    assert training_of(exact, vectors) == TrainingCost(90.0, 10.0, 9, 1, ["one processor"])
    assert training_of(rl, vectors) == TrainingCost(30.0, 30.0, 3, 3, ["one processor"])


def test_a_policy_per_weights_answers_under_these_only(config: Config, workspace: Workspace) -> None:
    methods = {"morlhf": make_morlhf(workspace), "soups": make(workspace, "Soups")}
    cells = plan_cells(config, methods, PROMPTS, "base")
    found: dict[str, set[Weights]] = {name: {cell.weights for cell in cells if cell.method == name} for name in methods}
    assert found["morlhf"] < found["soups"]
    assert len(found["morlhf"]) == 3 + 2 * 3
    assert len(found["soups"]) == 3 + 3 * 3 + 3
    thirds = config.model_copy(update={"compare": config.compare.model_copy(update={"weights": 4})})
    cells = plan_cells(thirds, methods, PROMPTS, "base")
    assert {cell.weights for cell in cells if cell.method == "morlhf"} == {((name, 1.0),) for name in NAMES}


@pytest.mark.parametrize(
    ("kind", "settings", "missing"),
    [
        ("Soups", {"kl": 0.3}, ["rl-a-kl0.3", "rl-b-kl0.3", "rl-c-kl0.3"]),
        ("Mod", {"tag": "-long"}, ["rl-a-kl0.2-long", "rl-b-kl0.2-long", "rl-c-kl0.2-long"]),
        ("DpoSoups", {"kl": 0.5}, ["dpo-a-kl0.5", "dpo-b-kl0.5", "dpo-c-kl0.5"]),
        ("Morlhf", {}, [f"morlhf-{one}0.75-{other}0.25-kl0.2" for one, other in ("ab", "ac", "bc")]),
    ],
)
def test_missing_policies_are_refused_with_the_command_that_trains_them(
    workspace: Workspace,
    kind: str,
    settings: dict[str, Any],
    missing: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"compare\.methods\.trained: .* lacks the policies") as caught:
        make(workspace, kind, **settings)
    assert f"{', '.join(missing)}: run " in str(caught.value)
    command = str(caught.value).partition("python -m benchmarks.comparison.train ")[2].split()
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(workspace.config.model_dump(mode="json")))
    train.main([*(str(file) if word == "FILE" else word for word in command), "--list"])
    assert sorted(capsys.readouterr().out.split()) == sorted(missing)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("Soups", {"kl": 0}, "kl is 0"),
        ("Mod", {"kl": [0.1]}, r"kl is \[0.1\]"),
        ("Mod", {"tag": 2}, "tag is 2"),
        ("Morlhf", {"pair_weights": 0.5}, "pair_weights is 0.5"),
        ("Morlhf", {"pair_weights": [1.0]}, r"pair_weights is \[1.0\]"),
        ("Soups", {"pair_weights": [0.5]}, "trained.pair_weights' is unknown"),
    ],
)
def test_wrong_settings_are_refused(workspace: Workspace, kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(workspace, kind, **settings)


def test_policies_of_another_base_model_are_refused(tmp_path: Path, config: Config) -> None:
    tiny.write_base(tmp_path, eos_weight=0.5)
    other = config.model_copy(update={"base": config.base.model_copy(update={"model": str(tmp_path / tiny.MODEL)})})
    with pytest.raises(UserError, match="another base model"):
        make(Workspace(other), "Soups")
