"""TRL's trainers on this project's prompts, rewards and answers.

RL is GRPO without its two normalisations (Dr. GRPO, arXiv 2503.20783), whose gradient is that of RLOO (arXiv
2402.14740) times a constant; TRL's RLOO trainer accepts no other sampler and computes log-probabilities twice more.
The reward of an answer is sum_m w_m r_m - kl * log(pi / p). Its mean, E r - kl * KL, is largest at the optimum of
value-guided decoding with beta = 1 / kl.

Answers are sampled and scored as they are measured (`decode`): on the base model's truncated support.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from benchmarks.comparison.decode import MixtureDecoder
from benchmarks.comparison.merge import Deltas, add_deltas, deltas_of
from benchmarks.comparison.pairs import Pair
from benchmarks.comparison.policies import PolicySpec, Settings
from benchmarks.comparison.scoring import score_on_support
from benchmarks.comparison.usage import Budget, Usage
from mavis_dist.config import Config
from mavis_dist.core import noise
from mavis_dist.decode import Choice, Request, SamplingParams
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.rewards import Reward
from mavis_dist.types import RewardScale

Rewards = Mapping[str, tuple[Reward, RewardScale]]  # by objective
DIVERGENCE = "divergence"  # name of the reward log(pi / p)
ENDLESS = 1_000_000  # steps: the budget ends RL
warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
logging.getLogger("trl").setLevel(logging.ERROR)


class Merged:
    """A policy beside its base model, with weights that change while it is trained."""

    def __init__(self, base: BaseModel, max_rows: int):
        self._base, self._max_rows = base, max_rows
        self._plain = copy.deepcopy(base.model)  # decoders rearrange the weights of the models that they run
        self._kept: tuple[PreTrainedModel, MixtureDecoder] | None = None  # the policy's weights, and what runs them

    def decoder(self, deltas: Deltas) -> MixtureDecoder:
        """Of the base model with these differences; ends the use of the last one."""
        if self._kept is None or self._base.model.device.type == "cpu":
            policy = copy.deepcopy(self._plain)
            add_deltas(policy, deltas)
            self._kept = policy, MixtureDecoder(self._base, [replace(self._base, model=policy)], self._max_rows)
        else:  # decoders there read the model's own weights, and what they have recorded is replayed with others
            policy, _ = self._kept
            policy.load_state_dict(self._plain.state_dict())
            add_deltas(policy, deltas)
        return self._kept[1]


class Sampler:
    """Answers of the policy in a trainer, and their rewards."""

    def __init__(self, spec: PolicySpec, settings: Settings, config: Config, rewards: Rewards, usage: Usage):
        self._base = load_base(config.base.model, config.base.dtype, config.base.device)
        self._merged = Merged(self._base, config.rollout.rows)
        self._params = _sampling(config)
        self._spec, self._settings, self._config, self._rewards, self._usage = spec, settings, config, rewards, usage

    def __call__(self, questions: list[str], trainer: Any) -> dict[str, Any]:
        """Answers to groups of equal questions, as TRL's `rollout_func` returns them, with columns for `reward_of`."""
        factor = self._settings.sampled_per_answer
        sampled = [question for question in questions for _ in range(factor)]
        requests, choices = self._sample(sampled, trainer)
        columns = self._columns(sampled, choices)
        self._usage.means = {name: fmean(column) for name, column in columns.items()}
        weights = {**self._spec.weights, DIVERGENCE: -self._spec.kl}
        total = np.sum([share * np.array(columns[name]) for name, share in weights.items()], axis=0)
        kept = extremes(total, self._settings.answers_per_prompt * factor, self._settings.answers_per_prompt)
        return {
            "prompt_ids": [list(requests[n].prompt) for n in kept],
            "completion_ids": [choices[n].tokens for n in kept],
            "logprobs": None,  # only needed where sampling and training disagree on the weights
            **{name: [column[n] for n in kept] for name, column in columns.items()},
        }

    def _sample(self, questions: Sequence[str], trainer: Any) -> tuple[list[Request], list[Choice]]:
        adapter = get_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model))
        decoder = self._merged.decoder(deltas_of(adapter, self._settings.alpha / self._settings.rank))
        requests = [self._request(*numbered) for numbered in enumerate(questions, self._usage.answers)]
        choices = decoder.answer(requests)
        self._usage.answers += len(choices)
        self._usage.tokens += sum(len(choice.tokens) for choice in choices)
        return requests, choices

    def _request(self, number: int, question: str) -> Request:
        stream = noise.stream(self._config.seed, self._spec.name, number)
        prompt = self._base.chat(question, self._config.base.system)
        return Request("", prompt, params=self._params, stream=stream)

    def _columns(self, questions: Sequence[str], choices: Sequence[Choice]) -> dict[str, list[float]]:
        """Rewards in standard deviations by objective, and log(pi / p) of whole answers.

        The mean of log(pi / p) is KL(pi || p), and its gradient that of the divergence.
        """
        columns = {DIVERGENCE: [math.fsum(choice.logratios) for choice in choices]}
        for name, (reward, scale) in self._rewards.items():
            scores = reward.score(questions, [choice.text for choice in choices])
            columns[name] = [scale.standardise(score) for score in scores]
            self._usage.reward_calls += len(choices)
        return columns


def extremes(total_N: np.ndarray, group: int, kept: int) -> list[int]:
    """Of every group of answers the best and the worst, half each: the subset whose rewards vary most.

    Training takes much longer than sampling, and answers in the middle say little (PODS, arXiv 2504.13818).
    """
    found = []
    for start in range(0, len(total_N), group):
        order = start + np.argsort(total_N[start : start + group], kind="stable")
        found += [*order[: kept // 2].tolist(), *order[len(order) - (kept - kept // 2) :].tolist()]
    return found


class _DPO(DPOTrainer):
    """DPO on tokens: TRL would add an end-of-answer token to answers that were cut."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def rl_trainer(
    spec: PolicySpec,
    settings: Settings,
    config: Config,
    questions: Sequence[str],
    rewards: Rewards,
    folder: Path,
    usage: Usage,
) -> Any:
    """A trainer for the weighted, standardised rewards of a policy; checkpoints go to `folder`."""
    answers = settings.prompts_per_step * settings.answers_per_prompt
    rows = _pass_size(answers, settings.rows_per_pass)
    arguments = GRPOConfig(
        **_common(config, settings, folder),
        learning_rate=settings.rl_learning_rate,
        beta=0.0,  # the divergence is one of the rewards
        loss_type="dr_grpo",
        scale_rewards="none",
        max_steps=ENDLESS,
        num_generations=settings.answers_per_prompt,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=answers // rows,
        num_iterations=settings.updates,
        max_completion_length=config.rollout.max_tokens,
        reward_weights=[*spec.weights.values(), -spec.kl],
    )
    base = load_base(config.base.model, config.train.dtype, config.base.device)
    trainer = GRPOTrainer(
        model=base.model,
        reward_funcs=[reward_of(name) for name in (*spec.weights, DIVERGENCE)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": list(questions)}),
        processing_class=base.tokenizer,
        peft_config=_lora(settings),
        rollout_func=Sampler(spec, settings, config, rewards, usage),
    )
    return _watched(trainer, base, config, Budget(spec.name, usage, settings))


def dpo_trainer(
    spec: PolicySpec, settings: Settings, config: Config, pairs: Sequence[Pair], folder: Path, usage: Usage
) -> Any:
    """A trainer on preference pairs; checkpoints go to `folder`."""
    rows = _pass_size(settings.pairs_per_step, settings.rows_per_pass // 2)
    arguments = DPOConfig(
        **_common(config, settings, folder),
        learning_rate=settings.dpo_learning_rate,
        beta=spec.kl,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.pairs_per_step // rows,
        max_length=None,
    )
    base: BaseModel = load_base(config.base.model, config.train.dtype, config.base.device)
    columns = {
        "prompt_ids": [pair.prompt for pair in pairs],
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
    }
    trainer = _DPO(
        model=base.model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        peft_config=_lora(settings),
    )
    return _watched(trainer, base, config, Budget(spec.name, usage, settings))


def _pass_size(total: int, most: int) -> int:
    """The largest size of forward passes that split a step evenly."""
    return max(size for size in range(1, max(most, 1) + 1) if total % size == 0)


def _common(config: Config, settings: Settings, folder: Path) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "bf16": config.train.dtype == "bfloat16",
        "use_cpu": config.base.device == "cpu",
        "gradient_checkpointing": False,
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
    }


def _lora(settings: Settings) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def reward_of(name: str) -> Callable[..., list[float]]:
    """A reward for TRL: the sampler's column."""

    def column(**columns: Any) -> list[float]:
        found: list[float] = columns[name]
        return found

    column.__name__ = name  # TRL's name of its metrics
    return column


def _sampling(config: Config) -> SamplingParams:
    rollout = config.rollout
    return SamplingParams(rollout.max_tokens, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)


def _watched(trainer: Any, base: BaseModel, config: Config, budget: Budget) -> Any:
    score_on_support(trainer.model, _sampling(config), sorted(base.eos_ids))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(budget)
    trainer.create_scheduler = partial(_decay, trainer, budget)
    return trainer


def _decay(trainer: Any, budget: Budget, *_: Any, **__: Any) -> LambdaLR:
    """A learning rate that falls to 0 while the budget is spent: a constant one lets noise move a trained policy."""
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda _: 1 - min(budget.spent, 1.0))
    return trainer.lr_scheduler
