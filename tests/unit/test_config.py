"""An invalid config is refused with one sentence that names the key, its value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mavis_dist import config as config_module
from mavis_dist.config import Config, ConfigError, conflicts, describe, flatten, load, parse
from tests.root import ROOT

MINIMAL: dict[str, Any] = {"run": "r", "objectives": {"a": {"reward": "sentiment"}}}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load(path).objectives


def test_the_comparison_is_of_the_studys_run() -> None:
    study, comparison = load(ROOT / "jobs/configs/study.yaml"), load(ROOT / "jobs/configs/comparison.yaml")
    assert comparison.model_copy(update={"compare": study.compare}) == study
    assert {"dpo", "soups", "mod", "morlhf", "best_of_4", "prompt", "mato", "mavis"} <= set(comparison.compare.methods)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rolout": {}}, ["'rolout'", "did you mean 'rollout"]),
        ({"rollout": {"rowz": 3}}, ["'rollout.rowz'", "3", "did you mean 'rollout.rows'"]),
        ({"rollout": {"rows": "many"}}, ["'rollout.rows'", "'many'", "integer"]),
        ({"rollout": {"max_tokens": 2}}, ["'rollout'", "max_tokens (2)", "layers (5)"]),
        ({"steer": {"beta": -1}}, ["'steer.beta'", "-1", "greater than or equal to 0"]),
        ({"steer": {"beta": float("inf")}}, ["'steer.beta'", "finite"]),
        ({"objectives": {}}, ["'objectives'", "at least 1"]),
        ({"objectives": {"a": {"reward": "sentimnt"}}}, ["'objectives.a'", "sentimnt", "'sentiment'"]),
        ({"objectives": {"a": {"reward": "classifier"}}}, ["'objectives.a.model'", "missing"]),
        ({"objectives": {"a": {"reward": "judge", "url": "host:1"}}}, ["'objectives.a.url'", "host:1"]),
        ({"compare": {"judge": {"url": "http://host/v1", "modell": "m"}}}, ["'compare.judge.modell'", "judge.model"]),
        ({"objectives": {"a": {"reward": "function", "path": "no colon"}}}, ["'objectives.a.path'", "no colon"]),
        ({"objectives": {"../a": {"reward": "brevity"}}}, ["'../a'", "letters"]),
        ({"evaluate": {"limit_answers": 3}}, ["'evaluate.limit_answers'", "3", "at least 4", "0 to leave it out"]),
        ({"prompts": {"train": 4, "validation": 4}}, ["validation (4)", "train (4)"]),
        ({"train": {"trees_per_step": 3, "workers": 2}}, ["trees_per_step (3)", "workers (2)"]),
        ({"value": {"kind": "heads"}}, ["'value.kind'", "'heads'", "'states'"]),
        ({"value": {"kind": "states", "backbone": "gpt2"}}, ["backbone (gpt2)", "leave backbone out"]),
        ({"value": {"kind": "states", "lora_rank": 8}}, ["lora_rank (8)", "must be 0"]),
        ({"serve": {"host": "[::1]"}}, ["'serve.host'", "[::1]", "without brackets"]),
        ({"serve": {"base_replicas": 0}}, ["'serve.base_replicas'", "0", "greater than or equal to 1"]),
        ({"serve": {"value_replicas": {"min": 3, "max": 2}}}, ["'serve.value_replicas'", "max (2)", "min (3)"]),
        ({"serve": {"base_replicas": {"min": 1}}}, ["'serve.base_replicas.max'", "missing"]),
        ({"compare": {"methods": {"../base": {}}}}, ["'compare.methods.../base", "match"]),
        ({"compare": {"methods": {"mavis": 3}}}, ["'compare.methods.mavis'", "3", "dictionary"]),
        ({"compare": {"weights": 1}}, ["'compare.weights'", "1", "greater than or equal to 2"]),
        ({"compare": {"kl": 0}}, ["'compare.kl'", "0", "greater than 0"]),
        ({"run": "../elsewhere"}, ["'run'", "../elsewhere"]),
    ],
)
def test_errors_name_key_value_and_remedy(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**MINIMAL, **change})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_and_a_broken_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load(broken)


def test_overrides_replace_settings_and_invalid_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    changed = load(path, ["rollout.rows=5", "train.learning_rate=1e-5", "objectives.b.reward=brevity"])
    assert changed.rollout.rows == 5
    assert changed.train.learning_rate == pytest.approx(1e-5)
    assert set(changed.objectives) == {"a", "b"}
    for bad in ("rollout.rows", "=3", "run.deeper=3"):
        with pytest.raises(ConfigError, match="override"):
            load(path, [bad])


def test_a_relative_storage_folder_becomes_absolute_and_a_uri_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert Path(load(path, ["storage=somewhere"]).storage).is_absolute()
    assert load(path, ["storage=s3://bucket/runs"]).storage == "s3://bucket/runs"


def test_help_documents_every_key_once() -> None:
    text = describe()
    for key in flatten(parse(MINIMAL)):
        if not key.startswith("objectives."):
            assert text.count(f"  {key} (") == 1, key


def test_the_layer_of_states_has_a_default_of_its_own() -> None:
    """It survives being stored with the run; layers that are named are kept."""
    config = parse({**MINIMAL, "value": {"kind": "states"}})
    assert config.value.layers is None
    assert parse(config.model_dump(mode="json")) == config
    assert parse({**MINIMAL, "value": {"kind": "states", "layers": 8}}).value.layers == 8
    assert parse({**MINIMAL, "value": {"kind": "model"}}).value.layers == parse(MINIMAL).value.layers == 8


def test_methods_are_names_or_names_with_settings() -> None:
    def methods(given: Any) -> dict[str, Any]:
        return parse({**MINIMAL, "compare": {"methods": given}}).compare.methods

    assert methods(["base", "mavis"]) == methods({"base": None, "mavis": {}}) == {"base": {}, "mavis": {}}
    assert methods({"full": {"method": "mavis", "strengths": [1, 2]}})["full"]["strengths"] == [1, 2]


def test_the_number_of_keys_stays_small() -> None:
    """Those of `serve`, `compare` and objectives apart: only who operates a service, compares methods or chooses that
    kind of reward reads them.
    """
    keys = set(config_module._known_keys())
    of_serve, of_compare, of_objectives = (
        {key for key in keys if key.startswith(part)} for part in ("serve.", "compare.", "objectives.")
    )
    assert len(keys - of_serve - of_compare - of_objectives) <= 71
    assert len(of_serve) <= 27
    assert len(of_compare) <= 10
    assert len(of_objectives) <= 9


def test_settings_that_would_mix_two_runs_are_refused() -> None:
    old = parse(MINIMAL)
    [conflict] = conflicts(old, parse({**MINIMAL, "seed": 1}))
    assert "'seed' is 1" in conflict
    assert "started with 0" in conflict
    changed_reward = {**MINIMAL, "objectives": {"a": {"reward": "brevity"}}}
    assert "objectives.a.reward" in conflicts(old, parse(changed_reward))[0]


def test_machines_iterations_and_new_objectives_may_change() -> None:
    free = {
        "iterations": 5,
        "rollout": {"actors": 9, "rows": 3},
        "serve": {"port": 1234},
        "evaluate": {"grid": 7},
        "distill": {"epochs": 7},
        "compare": {"methods": ["base", "mavis"], "seeds": 3},
        "objectives": {**MINIMAL["objectives"], "b": {"reward": "brevity"}},
    }
    assert conflicts(parse(MINIMAL), parse({**MINIMAL, **free})) == []


def test_a_config_survives_being_written_and_read() -> None:
    config = load(ROOT / "jobs/configs/hh_rlhf.yaml")
    assert parse(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert isinstance(config, Config)
