"""What training a policy has cost, its budget, and the checkpoints that a killed training resumes from."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.comparison.policies import Settings
from mavis_dist.progress import say

USAGE_FILE = "usage.json"  # in a checkpoint
LINE_EVERY_S = 10.0
SAMPLED = "sampled/"  # begins names of means over all sampled answers; TRL's own are over those that it trains on


@dataclass
class Usage:
    """What training has cost so far."""

    tokens: int = 0  # sampled
    answers: int = 0  # sampled, or read from the trees
    reward_calls: int = 0  # answers scored, once per objective
    seconds: float = 0.0  # all attempts together, without what a killed one did after its last checkpoint
    steps: int = 0
    means: dict[str, float] = field(default_factory=dict)  # of all answers last sampled: rewards, sd, and log(pi / p)
    history: list[dict[str, float]] = field(default_factory=list)  # TRL's metrics of every step

    @property
    def costs(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("history", "means")}


def last_checkpoint(folder: Path, settings: Settings) -> tuple[Path | None, Usage]:
    """The newest checkpoint in a folder, with its usage; those of other settings are deleted."""
    found = get_last_checkpoint(folder) if folder.exists() else None
    if found is None or not (file := Path(found) / USAGE_FILE).exists():
        return None, Usage()
    stored = json.loads(file.read_text())
    if stored["settings"] != asdict(settings):
        shutil.rmtree(folder)
        return None, Usage()
    return Path(found), Usage(**stored["usage"])


class Budget(TrainerCallback):
    """Counts, prints progress, stops training when the budget is spent, and writes the usage into checkpoints."""

    def __init__(self, name: str, usage: Usage, settings: Settings):
        self._stage, self.usage, self._settings = f"train {name}", usage, settings
        self._before, self._started, self._shown = usage.seconds, time.monotonic(), 0.0
        self.spent = self._of_budget  # of seconds, tokens or steps, whichever is largest; 1: training ends

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        usage = self.usage
        usage.steps, usage.seconds = state.global_step, self._before + time.monotonic() - self._started
        self.spent = max(self._of_budget, usage.steps / state.max_steps)
        if self.spent >= 1:
            control.should_training_stop = True

    @property
    def _of_budget(self) -> float:
        return max(self.usage.seconds / self._settings.seconds, self.usage.tokens / self._settings.tokens)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any) -> None:
        numbers = {key: value for key, value in passed["logs"].items() if isinstance(value, float)}
        numbers.update({f"{SAMPLED}{name}": mean for name, mean in self.usage.means.items()})
        self.usage.history.append({"step": state.global_step, **numbers})
        if time.monotonic() - self._shown < LINE_EVERY_S:
            return
        self._shown, usage = time.monotonic(), self.usage
        shown = {key.removeprefix(SAMPLED).removeprefix("rewards/"): numbers[key] for key in numbers if _is_shown(key)}
        figures = ", ".join(f"{key} {number:.3g}" for key, number in shown.items())
        spent = f"{usage.seconds:.0f}/{self._settings.seconds:.0f} s, {usage.tokens} tokens sampled"
        say(self._stage, f"step {usage.steps}, {spent}  {figures}".rstrip())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        stored = {"settings": asdict(self._settings), "usage": asdict(self.usage)}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / USAGE_FILE).write_text(json.dumps(stored))


def _is_shown(metric: str) -> bool:
    return metric in ("loss", "rewards/margins") or metric.startswith(SAMPLED)
