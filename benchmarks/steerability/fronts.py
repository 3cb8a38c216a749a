"""Summarises answers over the weights of objective pairs: fronts, correlations, and differences between methods.

Rewards are in standard deviations of the run's base answers. Shapes: W weights, O the two objectives, P prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import moocore
import numpy as np
from scipy import stats

from benchmarks.steerability.answers import (
    MATO,
    PARAMS,
    PERSONAL,
    PERSONAL_PREFERENCE,
    PLAIN,
    PROMPTED,
    TRAINED,
    Measured,
    setting,
)
from mavis_dist.compare.preferences import PREFERENCES
from mavis_dist.evaluate.sweep import Estimate, bootstrap


@dataclass(frozen=True)
class Front:
    """One method over the weights of one pair."""

    method: str
    pair: tuple[str, str]
    rewards: list[list[float]]  # [W, O], means over prompts; one row for methods without weights
    hypervolume: float  # sd^2, above the worst of each objective among all methods of the pair
    spearman: list[float]  # of each objective's weight and its reward; empty for methods without weights
    weighted: list[float]  # [P], sum of weight times reward, mean over the weights
    divergence: float  # nats per answer
    num_tokens: float  # per answer


@dataclass(frozen=True)
class Summary:
    """One method over all pairs."""

    method: str
    num_pairs: int  # all pairs except for value models, which not every objective has
    weighted: Estimate  # weighted reward, sd
    behind_mato: Estimate | None  # MATO's minus this method's on the same pairs, paired by prompt
    hypervolume: float
    spearman: float | None  # mean over pairs and objectives


@dataclass(frozen=True)
class Steerability:
    """All figures."""

    conditions: dict[str, Any]
    fronts: list[Front]
    summaries: list[Summary]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(measured: Measured) -> Steerability:
    methods = (*PARAMS, TRAINED, PROMPTED, PLAIN)
    fronts = [front for pair in measured.pairs for front in _fronts(measured, pair, methods)]
    config = measured.config
    conditions = {
        "preferences": {**PREFERENCES, PERSONAL: PERSONAL_PREFERENCE},
        "strengths": {method: params.strength for method, params in PARAMS.items()},
        "model": config.base.model,
        "dtype": config.base.dtype,
        "system": config.base.system,
        "prompts": measured.num_prompts,
        "samples": dict(measured.samples),
        "weights": list(measured.weights),
        "max_tokens": config.rollout.max_tokens,
        "beta": config.steer.beta,
    }
    return Steerability(conditions, fronts, [_summary(method, fronts) for method in methods])


def _fronts(measured: Measured, pair: tuple[str, str], methods: tuple[str, ...]) -> list[Front]:
    rewards = {method: _rewards(measured, pair, method) for method in methods if measured.has(method, pair)}
    worst_O = np.concatenate([rewards_WOP.mean(-1) for rewards_WOP in rewards.values()]).min(0)
    return [_front(measured, pair, method, rewards_WOP, worst_O) for method, rewards_WOP in rewards.items()]


def _rewards(measured: Measured, pair: tuple[str, str], method: str) -> np.ndarray:
    """[W, O, P]; the mean over the samples of a prompt."""
    rows = []
    for weight in measured.weights:
        answers = measured.answers[setting(method, pair, weight)]
        rows.append(
            [
                np.array([measured.scales[name].standardise(r) for r in answers.reward[name]])
                .reshape(measured.num_prompts, -1)
                .mean(1)
                for name in pair
            ]
        )
    return np.array(rows)


def _front(
    measured: Measured, pair: tuple[str, str], method: str, rewards_WOP: np.ndarray, worst_O: np.ndarray
) -> Front:
    weights_WO = np.array([[weight, 1 - weight] for weight in measured.weights])
    means_WO = rewards_WOP.mean(-1)
    has_weights = method not in (PROMPTED, PLAIN)
    answers = [measured.answers[s] for s in {setting(method, pair, weight): None for weight in measured.weights}]
    return Front(
        method=method,
        pair=pair,
        rewards=means_WO.tolist() if has_weights else means_WO[:1].tolist(),
        hypervolume=float(moocore.hypervolume(means_WO, ref=worst_O, maximise=True)),
        spearman=[_spearman(weights_WO[:, o], means_WO[:, o]) for o in (0, 1)] if has_weights else [],
        weighted=(weights_WO[:, :, None] * rewards_WOP).sum(1).mean(0).tolist(),
        divergence=fmean(fmean(a.divergence) for a in answers),
        num_tokens=fmean(fmean(a.num_tokens) for a in answers),
    )


def _spearman(weights_W: np.ndarray, means_W: np.ndarray) -> float:
    """0 if all means are equal."""
    return 0.0 if np.ptp(means_W) == 0 else float(stats.spearmanr(weights_W, means_W).statistic)


def _summary(method: str, fronts: list[Front]) -> Summary:
    mine = [front for front in fronts if front.method == method]
    weighted_P = np.mean([front.weighted for front in mine], axis=0)
    pairs = {front.pair for front in mine}
    mato_P = np.mean([front.weighted for front in fronts if front.method == MATO and front.pair in pairs], axis=0)
    correlations = [rho for front in mine for rho in front.spearman]
    return Summary(
        method,
        len(pairs),
        bootstrap(weighted_P),
        None if method == MATO else bootstrap(mato_P - weighted_P),
        float(np.mean([front.hypervolume for front in mine])),
        float(np.mean(correlations)) if correlations else None,
    )
