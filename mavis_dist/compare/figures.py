"""The figures of a comparison, from the stored answers of its cells. No models.

Shapes: P prompts, N answers of the base model to each, S strengths, D seeds, R resamples, W weights, O objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from mavis_dist.compare import statistics
from mavis_dist.compare.cells import Answers, Weights, weights_name
from mavis_dist.compare.equal_kl import Curve
from mavis_dist.compare.measured import Measured, Setting, inside, nearest_answers
from mavis_dist.compare.method import BASE
from mavis_dist.compare.results import AtStrength, Comparison, Cost, Group, MethodResult, Text, WeightsResult
from mavis_dist.compare.text_quality import distinct_2, repetition
from mavis_dist.evaluate.sweep import Estimate, Limit, limit_curve

REFERENCE = "mavis"  # which others are compared with, if it takes part


def summarise(measured: Measured, training_s: Mapping[str, float], conditions: Mapping[str, str]) -> Comparison:
    """All figures; `training_s` by method, seconds."""
    methods, vectors = measured.methods, measured.vectors
    settings = measured.settings
    reference = REFERENCE if REFERENCE in methods else next((name for name in methods if name != BASE), BASE)
    groups = [group for size in (2, 3) for group in combinations(measured.scales, size)] or [tuple(measured.scales)]
    volume_R = {(group, method): _volume(measured, method, group) for group in groups for method in methods}
    pairs = [group for group in groups if len(group) == min(map(len, groups))]
    totals = {
        "weighted": {m: np.mean([settings[m, w].weighted_R for w in vectors], axis=0) for m in methods},
        "hypervolume": {m: np.mean([volume_R[pair, m] for pair in pairs], axis=0) for m in methods},
        "share": {m: np.mean([settings[m, w].share_R for w in vectors], axis=0) for m in methods},
    }
    anywhere_R = {m: np.mean([_whole_volume(measured, m, pair) for pair in pairs], axis=0) for m in methods}
    nearest = {m: [answers for w in vectors for answers in nearest_answers(measured, m, w)] for m in methods}
    return Comparison(
        conditions=dict(conditions),
        reference=reference,
        kl=measured.kl,
        num_prompts=measured.weights_RP.shape[1],
        objectives=list(measured.scales),
        limit=_mean_limit([measured.mixture(weights) for weights in vectors]),
        settings=[_weights_result(measured, settings[m, w], m, w) for m in methods for w in vectors],
        groups=[_group(group, m, reference, volume_R) for group in groups for m in methods],
        methods=[
            MethodResult(
                method=m,
                weighted=statistics.estimate(totals["weighted"][m]),
                behind=_unless(m == reference, totals["weighted"][reference] - totals["weighted"][m]),
                hypervolume=statistics.estimate(totals["hypervolume"][m]),
                hypervolume_anywhere=statistics.estimate(anywhere_R[m]),
                hypervolume_ratio=_unless(
                    m in (reference, BASE), statistics.ratio(totals["hypervolume"][reference], totals["hypervolume"][m])
                ),
                share=statistics.estimate(totals["share"][m]),
                spearman=_spearman(measured, m, pairs) if m != BASE else None,
                text=_text(nearest[m]),
                cost=_cost(nearest[m], training_s[m]),
                strengths=_by_strength(measured, m, {w: settings[m, w] for w in vectors}),
            )
            for m in methods
        ],
        winners={name: statistics.winner(found) for name, found in totals.items()},
    )


def _mean_limit(mixtures: Sequence[np.ndarray]) -> Limit:
    """The mean of the limits of several rewards at every divergence."""
    curves = [limit_curve(rewards_PN) for rewards_PN in mixtures]
    return Limit(curves[0].divergence, [float(gain) for gain in np.mean([curve.gain for curve in curves], axis=0)])


def _unless(is_left_out: bool, value_R: np.ndarray) -> Estimate | None:
    return None if is_left_out else statistics.estimate(value_R)


def _volume(measured: Measured, method: str, group: Sequence[str]) -> np.ndarray:
    """The hypervolume [R] of the gains at the KL."""
    found = [measured.settings[method, weights].gain_R for weights in inside(measured, group)]
    return statistics.hypervolumes(np.array([[gain_R[name] for name in group] for gain_R in found]).transpose(2, 0, 1))


def _whole_volume(measured: Measured, method: str, group: Sequence[str]) -> np.ndarray:
    """The hypervolume [R] of the gains at all strengths, whatever their KL."""
    found = [measured.settings[method, weights].curves for weights in inside(measured, group)]
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
        strengths=_by_strength(measured, method, {weights: setting}),
    )


def _by_strength(measured: Measured, method: str, settings: Mapping[Weights, Setting]) -> list[AtStrength]:
    """A method at every strength, means over these weights."""
    rows = [measured.by_strength(method, weights) for weights in settings]

    def mean(curves: Sequence[Curve]) -> Curve:
        return Curve(np.mean([c.kl_SP for c in curves], axis=0), np.mean([c.gain_SP for c in curves], axis=0))

    weighted = mean([setting.weighted for setting in settings.values()])
    gains = {name: mean([setting.curves[name] for setting in settings.values()]) for name in measured.scales}
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


def _group(
    group: Sequence[str], method: str, reference: str, volume_R: Mapping[tuple[tuple[str, ...], str], np.ndarray]
) -> Group:
    ours_R, theirs_R = volume_R[tuple(group), reference], volume_R[tuple(group), method]
    return Group(
        list(group),
        method,
        statistics.estimate(theirs_R),
        _unless(method in (reference, BASE), statistics.ratio(ours_R, theirs_R)),
    )


def _spearman(measured: Measured, method: str, pairs: Sequence[Sequence[str]]) -> float | None:
    """Mean over pairs and objectives; None if gains are unknown or there is no pair."""
    found = []
    for pair in (pair for pair in pairs if len(pair) == 2):
        vectors = inside(measured, pair)
        for name in pair:
            weights_W = np.array([dict(w).get(name, 0.0) for w in vectors])
            gain_W = np.array([measured.settings[method, w].gain_R[name][0] for w in vectors])
            found.append(float("nan") if np.isnan(gain_W).any() else statistics.spearman(weights_W, gain_W))
    return _known(float(np.mean(found))) if found else None


def _text(corpora: Sequence[Answers]) -> Text:
    surprise = sum(float(corpus.surprise.sum()) for corpus in corpora)
    num_tokens = sum(int(corpus.surprise_tokens.sum()) for corpus in corpora)
    return Text(
        distinct_2=float(np.mean([distinct_2(corpus.text) for corpus in corpora])),
        repetition=float(np.mean([repetition(corpus.text) for corpus in corpora])),
        perplexity=math.exp(surprise / max(1, num_tokens)),
    )


def _cost(corpora: Sequence[Answers], training_s: float) -> Cost:
    seconds = sum(float(answers.seconds.sum()) for answers in corpora)
    return Cost(
        tokens_per_s=sum(float(answers.num_tokens.sum()) for answers in corpora) / seconds if seconds > 0 else None,
        generated=float(np.mean([answers.generated for answers in corpora])),
        reward_calls=float(np.mean([answers.reward_calls for answers in corpora])),
        training_s=training_s,
    )
