"""Whole runs from their configs, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import plan
from mavis_dist.config import parse
from mavis_dist.plan import PlanError
from mavis_dist.sizing.machines import Machines, parse_machines
from mavis_dist.sizing.predict import predict, scaling
from mavis_dist.sizing.rates import Rates
from mavis_dist.sizing.simulate import Faults
from mavis_dist.sizing.workload import Lengths, num_points, stages
from mavis_dist.types import UserError
from tests.unit.sizing.shapes import MODELS_7B, run_config, write_config

RATES = Rates(100.0, 50.0, step_s=2.0, answers_per_s=10.0, actor_start_s=5.0, train_start_s=20.0, label_start_s=3.0)
PROMPTS = {"train": 12, "validation": 4, "evaluation": 4}
ROLLOUT = {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 20, "prompts_per_shard": 4}
SMALL: dict[str, Any] = {
    "prompts": PROMPTS,
    "rollout": {**ROLLOUT, "cpus_per_actor": 1},
    "train": {"epochs": 2, "trees_per_step": 4},
    "evaluate": {"limit_answers": 10},
}
ONE = Machines(count=1, cpus=1, memory_gib=8)


def test_one_machine_takes_the_sum_of_its_work() -> None:
    run = predict(run_config(2, **SMALL), None, ONE, RATES, Lengths(prompt=10))
    tokens = 12 * (2 + 4) * 10  # trees x segments x tokens of a segment
    assert run.seconds == pytest.approx(
        {
            "rollouts i0": 5 + tokens / 100,
            "labels i0": 3 + 2 * 12 * 4 / 10,
            "train i0": 2 * (20 + 2 * 2 * 2),  # two objectives, one after the other, two epochs of two steps
            "limit": 5 + 4 * 10 * 20 / 100,
            "evaluate": 4 * 4 * 20 / 50,  # the same actors; the base model, two objectives and a point between
        }
    )
    assert run.total_s == pytest.approx(sum(run.seconds.values()))


def test_later_iterations_train_every_objective_and_compare() -> None:
    names = [stage.stage for stage in stages(run_config(2, iterations=2, **SMALL), Lengths())]
    assert names[3:7] == ["rollouts i1", "labels i1", "train i1", "gate i1"]
    assert num_points(3, 6) == 1 + 3 + 3 * 4


def test_labels_are_scored_on_all_cores_by_whole_shards() -> None:
    config, answers = run_config(2, **SMALL), 12 * 4  # of each objective, in three shards
    for cores, parts in ((1, 1), (2, 1), (4, 2), (64, 3)):
        run = predict(config, None, Machines(1, cores, 8), RATES, Lengths(prompt=10))
        rounds = -(-2 * parts // cores)
        assert run.seconds["labels i0"] == pytest.approx(3 + rounds * answers / parts / 10)


def test_answers_of_other_rewards_than_rules_are_scored_on_all_cores_while_the_actors_wait() -> None:
    rewards = {"a": {"reward": "sentiment"}, "b": {"reward": "function", "path": "m:f"}, "c": {"reward": "relevance"}}
    config = parse({"run": "r", "objectives": rewards, **SMALL, "evaluate": {"limit_answers": 64}})
    one, many = (predict(config, None, Machines(1, cores, 8), RATES, Lengths(prompt=10)) for cores in (1, 8))
    assert one.seconds["labels limit"] == pytest.approx(3 + 2 * 4 * 64 / 10)
    assert many.seconds["labels limit"] == pytest.approx(3 + 64 / 10)  # each has four parts
    assert one.seconds["evaluate"] == pytest.approx(4 * 7 * 20 / 50)  # nothing starts again


def test_what_holds_a_stage_up_is_named_with_its_key() -> None:
    slow_start = Rates(100.0, 50.0, 2.0, 1e6, actor_start_s=0.0, train_start_s=0.0, label_start_s=0.0)
    rollout = {**SMALL["rollout"], "actors": 8}
    run = predict(run_config(**{**SMALL, "rollout": rollout}), None, Machines(8, 1, 8), slow_start)
    assert "lower rollout.prompts_per_shard (is 4)" in run.reasons["rollouts i0"]
    one = predict(run_config(**SMALL), None, Machines(2, 1, 8), slow_start)
    assert "rollout.actors is 1 and 2 fit" in one.reasons["rollouts i0"]
    assert "raise train.workers" in one.reasons["train i0"]
    queued = predict(run_config(3, **SMALL), None, ONE, slow_start)
    assert "1 of 3 objectives" in queued.reasons["train i0"]
    starting = predict(run_config(**SMALL), None, ONE, Rates(1e6, 1e6, 2.0, 1e6, 50.0, 1.0))
    assert "starting takes 50 of" in starting.bottleneck


def test_the_curve_is_never_slower_with_more_machines_and_slower_with_faults() -> None:
    config = run_config(3, **SMALL)
    whole = scaling(config, None, ONE, RATES)
    times = [run.total_s for run in whole]
    assert [run.machines.count for run in whole][-1] == 1000
    assert times == sorted(times, reverse=True)
    failing = scaling(config, None, ONE, RATES, faults=Faults(mtbf_s=100.0, restart_s=10.0))
    assert all(a.total_s >= b.total_s for a, b in zip(failing, whole, strict=True))
    assert sum(one.restarts for run in failing for one in run.ran) > 0


def test_machines_too_small_are_refused_and_left_out_of_the_curve() -> None:
    config = run_config(**{**SMALL, "train": {"workers": 4, "trees_per_step": 4}})
    with pytest.raises(PlanError, match=r"train\.workers=4"):
        predict(config, None, ONE, RATES)
    assert scaling(config, None, ONE, RATES)[0].machines.count == 4


def test_a_faster_gpu_and_a_group_decode_faster() -> None:
    gpu = {"base": {"device": "cuda"}, "rollout": {"gpus_per_actor": 1}, "train": {"gpus_per_worker": 1}}
    slower, faster = (
        predict(run_config(**gpu), MODELS_7B, parse_machines(f"1x4x{name}")).seconds["rollouts i0"]
        for name in ("A100", "H100")
    )
    assert faster < slower


def test_machines_are_read_from_short_words() -> None:
    machines = parse_machines("4x8xh100")
    assert (machines.count, machines.gpus, machines.cpus, machines.memory_gib) == (4, 8, 128, 1024)
    assert machines.gpu is not None
    assert machines.gpu.name == "H100"
    cores = parse_machines("2x16cpu")
    assert (cores.count, cores.cpus, cores.gpu) == (2, 16, None)
    assert parse_machines("1x8xA100-40GB").gpus == 8


@pytest.mark.parametrize("text", ["0x8xH100", "4x0xH100", "4x8", "x", "4x8xFOO", "2x0cpu", "-1x2cpu", "4x8xH100x2"])
def test_machines_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--machines"):
        parse_machines(text)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    model = write_config(tmp_path / "llama", "7b")
    file = tmp_path / "config.json"  # JSON is YAML
    settings = {
        "run": "r",
        "storage": str(tmp_path / "runs"),
        "objectives": {"a": {"reward": "sentiment"}},
        "base": {"model": str(model), "device": "cuda"},
        "rollout": {"gpus_per_actor": 1},
        "train": {"gpus_per_worker": 1, "dtype": "bfloat16"},
        "serve": {"gpus_per_replica": 1},
    }
    file.write_text(json.dumps(settings))
    return file


def run_plan(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        plan.main(words)
    return int(str(ended.value.code))


def test_the_command_prints_all_tables_and_writes_all_figures(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config_file), "--machines", "2x8xH100", "--price-per-hour", "30"]
    assert run_plan(*words, "--json", str(tmp_path / "plan.json")) == 0
    shown = capsys.readouterr().out
    for text in ("everything fits", "rollout actor", "weights 12.6", "bottleneck: ", "an estimate", "restarts"):
        assert text in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    figures = written["plan"]
    assert figures["memory"][0]["bytes"]["weights"] == 2 * 6_738_415_616
    assert figures["run"]["cost"] == pytest.approx(2 * 30 * sum(figures["run"]["seconds"].values()) / 3600)
    assert written["command"].startswith("python -m jobs.plan --config")
    assert [run["machines"] for run in figures["by_machines"]][:3] == [1, 2, 4]
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_a_line_and_an_exit_code(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(config_file), "--machines", "1x8xL4"]
    assert run_plan(*words, "train.gpus_per_worker=0") == 1
    shown = capsys.readouterr().out
    assert "does not fit: rollout actor needs" in shown
    assert "does not fit: base.device=cuda and train.gpus_per_worker=0" in shown
    assert run_plan(*words, "base.tensor_parallel=3") == 1
    assert "base.tensor_parallel=3 does not divide the heads of keys: set one of 1, 2, 4" in capsys.readouterr().out
    assert run_plan("--config", str(config_file), "--machines", "2x16cpu") == 1
    assert "the machines have no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--machines", "0x8xH100"], "--machines '0x8xH100'"),
        (["--machines", "4x8xFOO"], "use one of A10, L4"),
        (["--shape", "9b"], "use one of 1b, 7b"),
        (["--machines", "2x16cpu", "--gpu-memory", "80"], "need machines with GPUs"),
        (["--cpus", "0"], "--cpus is 0"),
        (["--tokens-per-second", "0"], "--tokens-per-second is 0"),
        (["base.model=no/such/model/here"], "no/such/model/here"),
        (["base.tensor_parallel=0"], "base.tensor_parallel"),
    ],
)
def test_bad_input_is_one_line(
    config_file: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan("--config", str(config_file), *words) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert part in shown.err
    assert shown.out == ""
