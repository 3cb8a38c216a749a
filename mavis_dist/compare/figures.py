"""The figures of a comparison, from the stored answers of its cells. No models.

Shapes: P prompts, N answers of the base model to each, S strengths, D seeds, R resamples, W weights, O objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

import numpy as np

from mavis_dist.compare import statistics
from mavis_dist.compare.cells import Answers, Weights, weights_name
from mavis_dist.compare.equal_kl import Curve
from mavis_dist.compare.measured import Measured, Setting, nearest_answers
from mavis_dist.compare.method import BASE
from mavis_dist.compare.results import (
    AtStrength,
    Comparison,
    Cost,
    Group,
    Judged,
    MethodResult,
    Text,
    TrainingCost,
    WeightsResult,
)
from mavis_dist.compare.text_quality import distinct_2, repetition
from mavis_dist.evaluate.sweep import Estimate, Limit, limit_curve

REFERENCE = "mavis"  # which others are compared with, if it takes part


def reference_of(methods: Sequence[str]) -> str:
    """The method that the others are compared with."""
    return REFERENCE if REFERENCE in methods else next((name for name in methods if name != BASE), BASE)


def summarise(
    measured: Measured,
    training: Mapping[str, TrainingCost],
    conditions: Mapping[str, str],
    judged: Mapping[str, Judged] = MappingProxyType({}),
) -> Comparison:
    """All figures; `training` by method."""
    methods, settings, common = measured.methods, measured.settings, measured.common
    reference = reference_of(methods)
    groups = [group for size in (2, 3) for group in combinations(measured.scales, size)] or [tuple(measured.scales)]
    pairs = [group for group in groups if len(group) == min(map(len, groups))]
    totals = _Totals(measured, pairs)
    nearest = {m: [answers for w in common(m) for answers in nearest_answers(measured, m, w)] for m in methods}
    return Comparison(
        conditions=dict(conditions),
        timed_on=measured.machine,
        reference=reference,
        kl=measured.kl,
        num_prompts=measured.weights_RP.shape[1],
        num_weights=len(measured.vectors),
        objectives=list(measured.scales),
        limit=_mean_limit([measured.mixture(weights) for weights in measured.vectors]),
        settings=[_weights_result(measured, setting, m, w) for (m, w), setting in settings.items()],
        groups=[_group(totals, group, m, reference) for group in groups for m in methods],
        methods=[
            MethodResult(
                method=m,
                num_weights=len(common(m)),
                weighted=statistics.estimate(totals.weighted(m, m)),
                behind=_unless(m == reference, totals.weighted(reference, m) - totals.weighted(m, reference)),
                hypervolume=statistics.estimate(totals.hypervolume(m, m)),
                hypervolume_anywhere=statistics.estimate(
                    totals.mean([_whole_volume(measured, m, pair) for pair in pairs if measured.front(pair, m)])
                ),
                hypervolume_ratio=_unless(
                    m in (reference, BASE),
                    statistics.ratio(totals.hypervolume(reference, m), totals.hypervolume(m, reference)),
                ),
                share=statistics.estimate(totals.share(m, m)),
                share_behind=_unless(m == reference, totals.share(reference, m) - totals.share(m, reference)),
                spearman=_spearman(measured, m, pairs) if m != BASE else None,
                text=_text(nearest[m]),
                cost=_cost(nearest[m], training[m], measured.machine),
                strengths=_by_strength(measured, m),
                judged=judged.get(m),
            )
            for m in methods
        ],
        winners={
            "weighted": statistics.winner(methods, totals.weighted),
            "hypervolume": statistics.winner(methods, totals.hypervolume),
            "share": statistics.winner(methods, totals.share),
        },
    )


class _Totals:
    """Figures [R] of a method, to be compared with another's: over the weights that both have, nan without any."""

    def __init__(self, measured: Measured, pairs: Sequence[Sequence[str]]):
        self._measured, self._pairs = measured, pairs
        self._volumes: dict[tuple[str, tuple[str, ...], tuple[Weights, ...]], np.ndarray] = {}

    def weighted(self, method: str, other: str) -> np.ndarray:
        """The mean gain by weight."""
        measured = self._measured
        return self.mean([measured.settings[method, w].weighted_R for w in measured.common(method, other)])

    def share(self, method: str, other: str) -> np.ndarray:
        """The mean share of the limit."""
        measured = self._measured
        return self.mean([measured.settings[method, w].share_R for w in measured.common(method, other)])

    def hypervolume(self, method: str, other: str) -> np.ndarray:
        """The mean hypervolume of the pairs."""
        fronts = [pair for pair in self._pairs if self._measured.front(pair, method, other)]
        return self.mean([self.volume(method, other, pair) for pair in fronts])

    def volume(self, method: str, other: str, group: Sequence[str]) -> np.ndarray:
        """The hypervolume of the gains at the KL."""
        vectors = self._measured.front(group, method, other)
        key = method, tuple(group), vectors
        if key not in self._volumes:
            found = [self._measured.settings[method, weights].gain_R for weights in vectors]
            gains_WOR = np.array([[gain_R[name] for name in group] for gain_R in found])
            self._volumes[key] = statistics.hypervolumes(gains_WOR.transpose(2, 0, 1)) if found else self.mean([])
        return self._volumes[key]

    def mean(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean(rows, axis=0) if rows else np.full(len(self._measured.weights_RP), np.nan)


def _mean_limit(mixtures: Sequence[np.ndarray]) -> Limit:
    """The mean of the limits of several rewards at every divergence."""
    curves = [limit_curve(rewards_PN) for rewards_PN in mixtures]
    return Limit(curves[0].divergence, [float(gain) for gain in np.mean([curve.gain for curve in curves], axis=0)])


def _unless(is_left_out: bool, value_R: np.ndarray) -> Estimate | None:
    return None if is_left_out else statistics.estimate(value_R)


def _whole_volume(measured: Measured, method: str, group: Sequence[str]) -> np.ndarray:
    """The hypervolume [R] of the gains at all strengths, whatever their KL."""
    found = [measured.settings[method, weights].curves for weights in measured.front(group, method)]
    gains = [[measured.weights_RP @ curves[name].gain_SP.T for name in group] for curves in found]
    points_RWSO = np.moveaxis(np.array(gains), (2, 3), (0, 2))  # from [W, O, R, S]
    return statistics.hypervolumes(points_RWSO.reshape(len(points_RWSO), -1, len(group)))


def _weights_result(measured: Measured, setting: Setting, method: str, weights: Weights) -> WeightsResult:
    return WeightsResult(
        method=method,
        name=weights_name(weights),
        weights=dict(weights),
        weighted=statistics.estimate(setting.weighted_R),
        gain={name: statistics.estimate(gain_R) for name, gain_R in setting.gain_R.items()},
        spent=_known(float(setting.spent_R[0])),
        share=statistics.estimate(setting.share_R),
        strengths=_by_strength(measured, method, [weights]),
    )


def _by_strength(measured: Measured, method: str, vectors: Sequence[Weights] = ()) -> list[AtStrength]:
    """A method at every strength, means over these weights; over all of its own if none are given."""
    vectors = vectors or measured.common(method)
    settings = [measured.settings[method, weights] for weights in vectors]
    rows = [measured.by_strength(method, weights) for weights in vectors]

    def mean(curves: Sequence[Curve]) -> Curve:
        return Curve(np.mean([c.kl_SP for c in curves], axis=0), np.mean([c.gain_SP for c in curves], axis=0))

    weighted = mean([setting.weighted for setting in settings])
    gains = {name: mean([setting.curves[name] for setting in settings]) for name in measured.scales}
    found = []
    for s, strength in enumerate(rows[0]):
        cells = [answers for row in rows for answers in row[strength]]
        found.append(
            AtStrength(
                strength=strength,
                divergence=_known(float(weighted.kl_SP[s].mean())),
                num_tokens=float(np.mean([answers.num_tokens for answers in cells])),
                generated=float(np.mean([answers.generated for answers in cells])),
                gain={name: statistics.mean(curve.gain_SP[s], measured.weights_RP) for name, curve in gains.items()},
                weighted=statistics.mean(weighted.gain_SP[s], measured.weights_RP),
            )
        )
    return found


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _group(totals: _Totals, group: Sequence[str], method: str, reference: str) -> Group:
    ratio_R = statistics.ratio(totals.volume(reference, method, group), totals.volume(method, reference, group))
    return Group(
        list(group),
        method,
        statistics.estimate(totals.volume(method, method, group)),
        _unless(method in (reference, BASE), ratio_R),
    )


def _spearman(measured: Measured, method: str, pairs: Sequence[Sequence[str]]) -> float | None:
    """Mean over pairs and objectives; None if gains are unknown or there is no pair."""
    found = []
    for pair in (pair for pair in pairs if len(pair) == 2):
        vectors = measured.front(pair, method)
        for name in pair if vectors else ():
            weights_W = np.array([dict(w).get(name, 0.0) for w in vectors])
            gain_W = np.array([measured.settings[method, w].gain_R[name][0] for w in vectors])
            is_known = len(vectors) > 1 and not np.isnan(gain_W).any()
            found.append(statistics.spearman(weights_W, gain_W) if is_known else float("nan"))
    return _known(float(np.mean(found))) if found else None


def _text(corpora: Sequence[Answers]) -> Text:
    surprise = sum(float(corpus.surprise.sum()) for corpus in corpora)
    num_tokens = sum(int(corpus.surprise_tokens.sum()) for corpus in corpora)
    return Text(
        distinct_2=float(np.mean([distinct_2(corpus.text) for corpus in corpora])),
        repetition=float(np.mean([repetition(corpus.text) for corpus in corpora])),
        perplexity=math.exp(surprise / max(1, num_tokens)),
    )


def _cost(corpora: Sequence[Answers], training: TrainingCost, machine: str) -> Cost:
    timed = [answers for answers in corpora if answers.machine == machine]
    seconds = sum(float(answers.seconds.sum()) for answers in timed)
    return Cost(
        tokens_per_s=sum(float(answers.num_tokens.sum()) for answers in timed) / seconds if seconds > 0 else None,
        generated=float(np.mean([answers.generated for answers in corpora])),
        reward_calls=float(np.mean([answers.reward_calls for answers in corpora])),
        training=training,
    )
