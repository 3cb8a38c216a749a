"""Answers compared by a judge: those of every method with the reference's, to the same prompts.

Every pair is asked about in both orders, because language models favour a place. A method wins a pair only if it wins
in both orders; everything else is a tie.

Shapes: W weights, J judged prompts, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mavis_dist.compare import statistics
from mavis_dist.compare.cells import weights_name
from mavis_dist.compare.equal_kl import resamples
from mavis_dist.compare.measured import Measured, nearest_answers
from mavis_dist.compare.prompted import wishes
from mavis_dist.compare.results import Judged
from mavis_dist.compare.workspace import Workspace
from mavis_dist.progress import Meter
from mavis_dist.rewards.judge import LanguageModel
from mavis_dist.sections import ComparingJudge
from mavis_dist.store import layout
from mavis_dist.store.files import digest
from mavis_dist.types import Prompt

STAGE = "judge"
OPTIONS = FIRST, SECOND, EQUAL = "A", "B", "C"
WON, TIED, LOST, UNREADABLE = "won", "tied", "lost", "unreadable"  # the last one counts as a tie
POINTS = {WON: 1.0, TIED: 0.5, UNREADABLE: 0.5, LOST: 0.0}
QUESTION = """Question:
{prompt}

Answer A:
{first}

Answer B:
{second}

Wishes:
{wishes}

Which answer meets the wishes better? Reply with A or B, or with C if they are equally good."""


def check_judge(settings: ComparingJudge, workspace: Workspace) -> None:
    """Raises UserError if an objective has no preference or the judge does not answer."""
    wishes(workspace, dict.fromkeys(workspace.config.objectives, 1.0))
    list(LanguageModel(settings).replies([QUESTION.format(prompt="1 + 1?", first="2", second="3", wishes="Be right.")]))


def judge(
    settings: ComparingJudge, workspace: Workspace, measured: Measured, prompts: Sequence[Prompt], reference: str
) -> dict[str, Judged]:
    """Every method against the reference, under all weights that both have; pairs that were judged before are read.

    The answers are those with the first seed, at the strengths nearest to the KL of the comparison.

    Raises:
        RewardError: the judge does not answer; what it has answered is stored.
    """
    prompts = prompts[: settings.prompts]
    model = LanguageModel(settings)
    compared = [(m, w) for m in measured.methods if m != reference for w in measured.common(m, reference)]
    outcomes: dict[str, list[list[str]]] = {}  # by method: [W][J]
    meter = Meter(STAGE, "pairs")
    for done, (method, weights) in enumerate(compared, 1):
        ours, theirs = (nearest_answers(measured, name, weights)[0].text for name in (method, reference))
        questions = both_orders([prompt.text for prompt in prompts], ours, theirs, wishes(workspace, dict(weights)))
        found = _stored(settings, workspace, model, f"{method}-{weights_name(weights)}", questions)
        outcomes.setdefault(method, []).append(found)
        meter.show(done * len(prompts), len(compared) * len(prompts), final=done == len(compared))
    return {method: summary(rows) for method, rows in outcomes.items()}


def both_orders(prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str], wished: str) -> list[str]:
    """Two questions per prompt: first with our answer as A, then with theirs."""
    questions = []
    for prompt, our, their in zip(prompts, ours, theirs, strict=False):  # only the first prompts are judged
        for first, second in ((our, their), (their, our)):
            questions.append(QUESTION.format(prompt=prompt, first=first, second=second, wishes=wished))
    return questions


def outcome(ours_first: Mapping[str, float], theirs_first: Mapping[str, float]) -> str:
    """Whether we won, from the judge's shares of the options in both orders."""
    if not (ours_first and theirs_first):
        return UNREADABLE
    verdicts = [max(shares, key=lambda option: shares[option]) for shares in (ours_first, theirs_first)]
    if verdicts == [FIRST, SECOND]:
        return WON
    return LOST if verdicts == [SECOND, FIRST] else TIED


def summary(outcomes_WJ: Sequence[Sequence[str]]) -> Judged:
    """Counts of all pairs, and the share that is preferred with its interval over prompts; a tie is half of each."""
    counts = Counter(one for row in outcomes_WJ for one in row)
    points_J = np.mean([[POINTS[one] for one in row] for row in outcomes_WJ], axis=0)
    preferred = statistics.mean(points_J, resamples(len(points_J)))
    return Judged(preferred, counts[WON], counts[TIED], counts[LOST], counts[UNREADABLE])


def _stored(
    settings: ComparingJudge, workspace: Workspace, model: LanguageModel, name: str, questions: Sequence[str]
) -> list[str]:
    """The outcomes of pairs [J], judged once."""
    inputs: dict[str, Any] = {"url": settings.url, "model": settings.model, "questions": list(questions)}
    path = layout.verdicts_file(f"{name.replace(' ', '')}-{digest(inputs)}")
    if not workspace.store.exists(path):
        shares = [reply.shares(OPTIONS) for reply in model.replies(questions)]
        workspace.store.write_json(path, {**inputs, "shares": shares})
    shares = workspace.store.read_json(path)["shares"]
    return [outcome(*both) for both in zip(shares[::2], shares[1::2], strict=True)]
