"""Rewards tried on made-up answers: what a few calls find does not end a run after all its trees have grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from mavis_dist import sections
from mavis_dist.rewards.build import build
from mavis_dist.rewards.protocol import RewardError
from mavis_dist.sections import Objective
from mavis_dist.types import one_line

ANSWERS = (
    "What a WONDERFUL question! Mix 500 g of flour with water, salt and yeast, let it rest, bake it for 40 minutes.",
    "no, i hate this stupid idea",
)
# Most rewards tell the two apart. These differ in what else rewards look at.
MORE = (
    "I'm sorry, but I can't help with that.",
    "1. Knead.\n2. Wait.\n3. Bake.\n\n- **Flour**\n- Water",
    "```python\nprint(sum(range(10)))\n```",
    '{"answer": 42, "unit": "minutes"}',
    "Yes.",
    "Why do you ask? Who are you? Is it for you?",
    "The answer is \\boxed{7}, since 3 + 4 = 7 (see https://example.org).",
    "Thank you, please tell me more; perhaps it helps. <think>Let me see.</think>",
    "Das Brot braucht Zeit. 面包需要时间。 🍞",
    "bread bread bread bread bread bread bread bread",
    "According to a study of 2019, however, about 12 % of all loaves fail.",
    "Once upon a time, an old baker lived by the sea. She sang while the dough rose, and nobody went home hungry.",
)


@dataclass(frozen=True)
class Trial:
    """The scores of made-up answers."""

    scores: tuple[float, ...]

    @property
    def spread(self) -> float:
        return max(self.scores) - min(self.scores)

    @property
    def doubt(self) -> str | None:
        """What a user may want to look at before a run; None: nothing. Rewards of what only good answers hold, such as
        code that runs, are equal here and differ in the run.
        """
        if self.spread > 0:
            return None
        return (
            f"all {len(self.scores)} made-up answers have the same score ({self.scores[0]:g}): nothing can be learnt "
            "unless the model's own answers differ in it"
        )


def try_reward(name: str, objective: Objective, max_tokens: int, prompts: Sequence[str], device: str = "cpu") -> Trial:
    """Build an objective's reward and score two made-up answers; more if these have the same score, and, but for a
    judge, an empty answer and one of `max_tokens` words, as a model may write them.

    Args:
        prompts: some of the run's own, since a reward may look up what it knows about them; used in turn.

    Raises:
        UserError: the reward cannot be built, raises, or returns something else than a finite number per answer.
    """

    def score(answers: Sequence[str]) -> list[float]:
        return reward.score(list(islice(cycle(prompts), len(answers))), answers)

    reward = build(objective, device, retries=0)
    try:
        scores = score(ANSWERS)
        if not isinstance(objective, sections.Judge):
            score([""])
            score([" ".join(["bread"] * max_tokens)])
        if len(set(scores)) == 1:
            scores += score(MORE)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward of objective {name!r} cannot score answers ({type(error).__name__}: {one_line(error)}): "
            "choose another model, or another reward"
        ) from error
    return Trial(tuple(scores))
