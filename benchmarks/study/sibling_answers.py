"""The sibling test of mavis_dist.core.siblings on the answers that tell the limit of steering. No Ray.

They are many children of every unseen prompt, where a held-out tree has few children of each state: intervals are a
third as wide. Only the prompt is a state with siblings here.

Shapes: P prompts, N answers of the base model to each, M objectives, J numbers of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common.result_cache import EvaluatedModel, result_path
from mavis_dist.config import Config
from mavis_dist.core import siblings
from mavis_dist.core.siblings import SiblingTest
from mavis_dist.models import value
from mavis_dist.models.load import load_base, load_tokenizer
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
    A model of several objectives is measured once for all of them.
    """
    path = result_path("siblings", model.fingerprint[:16], {"model": model.fingerprint, "texts": list(answers.texts)})
    if not store.exists(path):
        torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
        store.write_json(path, _measure(config, model, answers))
        print(f"{'siblings':<24} {model.name}", file=sys.stderr, flush=True)
    sums_JP4 = np.array(store.read_json(path)[model.objective])
    tests = {n: siblings.sibling_test(sums_P4) for n, sums_P4 in zip(AFTER, sums_JP4, strict=True)}
    return {n: test for n, test in tests.items() if test is not None}


def _measure(config: Config, model: EvaluatedModel, answers: BaseAnswers) -> dict[str, list[Any]]:
    """By objective the sums [J, P, 4] of siblings.state_sums."""
    dtype, device, base = config.base.dtype, config.base.device, None
    if value.load_card(model.folder).state_layer is not None:
        base = load_base(config.base.model, dtype, device)
    loaded, card = value.load(model.folder, getattr(torch, dtype), device, base)
    tokenizer, longest = load_tokenizer(config.base.model), config.rollout.max_tokens
    sums_MJP4 = np.zeros((len(card.objectives), len(AFTER), len(answers.prompts), 4))
    for p, (prompt, texts) in enumerate(zip(answers.prompts, answers.texts, strict=True)):
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in texts]
        ended = [ids if len(ids) == longest else [*ids, tokenizer.eos_token_id] for ids in tokens]
        values_MJN = values_after(loaded, prompt, ended)
        for m, j in np.ndindex(values_MJN.shape[:2]):
            reward_N = answers.base_PN[card.objectives[m]][p]
            sums_MJP4[m, j, p] = siblings.state_sums(values_MJN[m, j], reward_N)
    return dict(zip(card.objectives, sums_MJP4.tolist(), strict=True))


@torch.inference_mode()
def values_after(model: ValueModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Values [M, J, N] after the first tokens of answers to a prompt; of shorter ones at their end."""
    length = max(map(len, answers))
    # Padding on the right: no token attends to it.
    ids_NL = torch.tensor([[*prompt, *answer, *[0] * (length - len(answer))] for answer in answers])
    values_NLM = model(input_ids=ids_NL.to(model.heads.weight.device), use_cache=False).double().cpu().numpy()
    last_NJ = np.array([[len(prompt) + min(n, len(answer)) - 1 for n in AFTER] for answer in answers])
    return np.take_along_axis(values_NLM, last_NJ[..., None], axis=1).transpose(2, 1, 0)
