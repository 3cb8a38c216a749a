"""The paths of a run, relative to its folder `{storage}/{run}`. Plain strings: nothing is read or written.

A folder is finished when its marker exists (mavis_dist.store.files).
"""

from __future__ import annotations

from mavis_dist.types import Policy

CONFIG_FILE = "run.yaml"  # the config that the run was started with
STAGES_FILE = "stages.json"  # durations of the stages
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.jsonl"  # measurements of a value model's training, in its folder

ROLLOUTS = "rollouts"
VALUES = "values"
TRAINING = "train"  # files of unfinished training
SWEEP_FOLDER = "eval/sweep"
SWEEP_FILE = f"{SWEEP_FOLDER}/sweep.json"
LIMIT_FOLDER = "eval/limit/answers"  # answers of the base model that tell the limit of steering
COMPARISON = "comparison"  # of methods of steering: answers, figures, report
COMPARISON_FILE = f"{COMPARISON}/comparison.json"
COMPARISON_REPORT = f"{COMPARISON}/report.html"
RAY_TRAIN_FOLDER = f"{TRAINING}/.ray"  # Ray Train's own bookkeeping


def rollout_folder(policy: Policy) -> str:
    """The trees of a policy."""
    return f"{ROLLOUTS}/{policy.name}"


def label_folder(policy: Policy, objective: str) -> str:
    """An objective's rewards of the leaves of a policy's trees."""
    return f"labels/{policy.name}/{objective}"


def value_folder(objective: str, iteration: int) -> str:
    """A finished value model, or what one with several objectives has about this one."""
    return f"{VALUES}/{objective}/i{iteration}"


def shared_folder(fit: str, iteration: int) -> str:
    """A finished value model with a head for each of several objectives."""
    return f"shared/{fit}/i{iteration}"


def published_file(objective: str) -> str:
    """The file that names the model served for an objective."""
    return f"{VALUES}/{objective}/published.json"


def distilled_folder(name: str) -> str:
    """A distilled model."""
    return f"distilled/{name}"


def gate_folder(objective: str, iteration: int) -> str:
    """The decision whether an iteration replaces the previous one."""
    return f"gate/{objective}/i{iteration}"


def limit_reward_folder(objective: str) -> str:
    """An objective's rewards of the answers in LIMIT_FOLDER."""
    return f"eval/limit/rewards/{objective}"


def cell_file(name: str) -> str:
    """All answers of one cell of the comparison."""
    return f"{COMPARISON}/cells/{name}.parquet"


def verdicts_file(name: str) -> str:
    """What a judge said about pairs of answers."""
    return f"{COMPARISON}/verdicts/{name}.json"


def comparison_plot(name: str, kind: str) -> str:
    """A plot of the comparison as a file of its own; `kind` is svg or png."""
    return f"{COMPARISON}/plots/{name}.{kind}"


def checkpoint_folder(objective: str, iteration: int) -> str:
    """Checkpoints of a value model that is being trained."""
    return f"{_training_folder(objective, iteration)}/checkpoints"


def distilling_folder(name: str) -> str:
    """What an unfinished distillation has so far."""
    return f"{TRAINING}/.distilled/{name}"


def distilling_checkpoints(name: str) -> str:
    """Checkpoints of the trunk of an unfinished distillation."""
    return f"{distilling_folder(name)}/checkpoints"


def teacher_value_file(name: str, part: int) -> str:
    """The teachers' values of some trees, for a distillation."""
    return f"{distilling_folder(name)}/labels/part-{part:05d}.parquet"


def tensorboard_folder(objective: str, iteration: int) -> str:
    """TensorBoard's files of a value model's training; kept afterwards."""
    return f"{_training_folder(objective, iteration)}/tensorboard"


def _training_folder(objective: str, iteration: int) -> str:
    return f"{TRAINING}/{objective}/i{iteration}"
