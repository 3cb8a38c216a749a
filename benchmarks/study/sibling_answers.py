"""The sibling test of mavis_dist.core.siblings on the answers that tell the limit of steering. No Ray.

They are many children of every unseen prompt, where a held-out tree has few children of each state: intervals are a
third as wide. Only the prompt is a state with siblings here.

Shapes: P prompts, N answers of the base model to each, M objectives, J numbers of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common.result_cache import EvaluatedModel, result_path
from mavis_dist.config import Config
from mavis_dist.core import siblings
from mavis_dist.core.siblings import SiblingTest
from mavis_dist.models import value
from mavis_dist.models.load import load_tokenizer
from mavis_dist.models.value import ValueModel
from mavis_dist.store.files import Store

AFTER = (1, 2, 4, 8, 16)  # tokens of an answer


@dataclass(frozen=True, eq=False)
class BaseAnswers:
    """Many answers of the base model to every unseen prompt."""

    prompts: Sequence[tuple[int, ...]]  # token ids
    texts: Sequence[Sequence[str]]  # P lists of N
    base_PN: Mapping[str, np.ndarray]  # rewards by objective, sd above the mean


def measure(config: Config, store: Store, model: EvaluatedModel, answers: BaseAnswers) -> dict[int, SiblingTest]:
    """The test of a value model's objective after each number of tokens, without those that cannot be told.

    Answers are tokenised again from their text, with an end token where they are shorter than `rollout.max_tokens`.
    """
    inputs = {"value_model": model.fingerprint, "objective": model.objective, "texts": list(answers.texts)}
    path = result_path("siblings", model.name, inputs)
    if not store.exists(path):
        torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
        sums_JP4 = _measure(config, model, answers)
        store.write_json(path, sums_JP4.tolist())
        print(f"{'siblings':<24} {model.name}", file=sys.stderr, flush=True)
    tests = {n: siblings.sibling_test(np.array(part)) for n, part in zip(AFTER, store.read_json(path), strict=True)}
    return {n: test for n, test in tests.items() if test is not None}


def _measure(config: Config, model: EvaluatedModel, answers: BaseAnswers) -> np.ndarray:
    loaded, card = value.load(model.folder, getattr(torch, config.base.dtype), config.base.device)
    loaded = loaded.only(card.objectives.index(model.objective))
    tokenizer = load_tokenizer(config.base.model)
    sums_JP4 = np.zeros((len(AFTER), len(answers.prompts), 4))
    for p, (prompt, texts) in enumerate(zip(answers.prompts, answers.texts, strict=True)):
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][: config.rollout.max_tokens] for text in texts]
        ended = [ids if len(ids) == config.rollout.max_tokens else [*ids, tokenizer.eos_token_id] for ids in tokens]
        values_NJ = values_after(loaded, prompt, ended)
        sums_JP4[:, p] = [sums(values_NJ[:, j], answers.base_PN[model.objective][p]) for j in range(len(AFTER))]
    return sums_JP4


@torch.inference_mode()
def values_after(model: ValueModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Values [N, J] of one objective after the first tokens of answers to a prompt; of shorter ones at their end."""
    length = max(map(len, answers))
    # Padding on the right: no token attends to it.
    ids_NL = torch.tensor([[*prompt, *answer, *[0] * (length - len(answer))] for answer in answers])
    values_NL = model(input_ids=ids_NL.to(model.heads.weight.device), use_cache=False)[..., 0].double().cpu().numpy()
    last_NJ = np.array([[len(prompt) + min(n, len(answer)) - 1 for n in AFTER] for answer in answers])
    return np.take_along_axis(values_NL, last_NJ, axis=1)


def sums(value_N: np.ndarray, reward_N: np.ndarray) -> list[float]:
    """As siblings.sibling_sums, of one state."""
    v, y = value_N - value_N.mean(), reward_N - reward_N.mean()
    return [float(v @ y), float(v @ v), float(y @ y), 1.0]
