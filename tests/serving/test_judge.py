"""The project's own service as a judge."""

from __future__ import annotations

import pytest

from mavis_dist.compare.judged import LOST, TIED, UNREADABLE, WON, both_orders, outcome
from mavis_dist.config import Config
from mavis_dist.rewards import RewardError
from mavis_dist.rewards.judge import TOP, LanguageModel
from mavis_dist.sections import Endpoint


def test_the_service_is_a_judge(url: str, served_config: Config) -> None:
    """A random model's verdicts mean nothing, but they can be read and repeated."""
    model = LanguageModel(Endpoint(url=f"{url}/v1", model=served_config.base.model))
    questions = both_orders(["Why?"] * 4, ["Because."] * 4, ["No idea.", "So.", "Well.", "Hm."], "Be brief.")
    replies = list(model.replies(questions))
    assert [reply.text for reply in replies] == [reply.text for reply in model.replies(questions)]
    for reply in replies:
        assert len(reply.distributions) == len(reply.tokens) > 0
        assert all(0 < len(one) <= TOP and sum(one.values()) <= 1 + 1e-6 for one in reply.distributions)
        first = max(reply.distributions[0], key=reply.distributions[0].__getitem__).strip()
        assert not first or set(reply.shares([first])) == {first}
    shares = [reply.shares("ABC") for reply in replies]
    found = [outcome(*pair) for pair in zip(shares[::2], shares[1::2], strict=True)]
    assert set(found) <= {WON, TIED, LOST, UNREADABLE}


def test_a_model_that_the_service_does_not_have_is_named(url: str) -> None:
    with pytest.raises(RewardError, match="unknown-model"):
        list(LanguageModel(Endpoint(url=f"{url}/v1", model="unknown-model")).replies(["Why?"]))
