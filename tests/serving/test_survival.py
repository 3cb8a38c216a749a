"""The death of a replica during an answer changes no token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.streams import LONG, cpu_seconds, kill_busiest, kill_during, replica_pids, strike_during, whole_text


@pytest.fixture
def body(served_config):
    return {**LONG, "model": served_config.base.model, "seed": 11}


def test_killing_the_only_value_replica_of_an_objective_changes_no_token(http, url, body):
    expected = whole_text(http, url, body)
    victims = replica_pids("value-brief", "Value")
    assert len(victims) == 1
    assert kill_during(http, url, body, victims)["text"] == expected


def test_killing_a_base_replica_changes_no_token(http, url, body):
    # So many and so long that some are on the replica, and unfinished, when it dies.
    bodies = [{**body, "max_tokens": 300, "seed": seed, "guide_every": 1 + seed % 2} for seed in range(6)]
    # An answer that ends by a stop string looks for it across the move.
    bodies[0]["stop"] = whole_text(http, url, bodies[0])[90:94]
    # One with preferences sums the rewards of its tokens again.
    bodies[2]["preferences"] = bodies[3]["preferences"] = [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]
    expected = [whole_text(http, url, body) for body in bodies]
    # Chance may deal all answers to one replica: the one that works on them dies, by the blow of the last one alone.
    strike = partial(kill_busiest, cpu_seconds(replica_pids("main", "Base")))
    strikes = [lambda: None] * (len(bodies) - 1) + [strike]
    with ThreadPoolExecutor(len(bodies)) as pool:
        choices = list(pool.map(partial(strike_during, http, url), bodies, strikes))
    assert [choice["text"] for choice in choices] == expected
    # The divergence spent before a death is not known: at least one answer moved, and says so.
    assert None in [choice["mavis"]["divergence"] for choice in choices]
