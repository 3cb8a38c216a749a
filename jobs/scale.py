"""The number of replicas of a running service: show it, or change it and wait.

    python -m jobs.scale                      current and target counts
    python -m jobs.scale base=3 positive=2    replicas of the base model, and of an objective's value model

Works through Ray's dashboard, with the cluster's token (RAY_AUTH_MODE=token), from any machine that reaches it. Running
answers are not disturbed. A service whose counts are ranges scales by load, and refuses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs import arguments
from mavis_dist.types import UserError

if TYPE_CHECKING:
    from serve.dashboard import Dashboard, Scaled

STAGE = "scale"
POLL_S = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.scale", description="Show or change numbers of replicas.")
    parser.add_argument("counts", nargs="*", metavar="NAME=COUNT", help="base, or an objective, and its replicas")
    arguments.add_dashboard(parser)
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="until the replicas run (default: %(default)s)"
    )
    given = parser.parse_args(argv)
    arguments.refusing(lambda: run(given.dashboard, parse(given.counts), given.wait))


def parse(counts: Sequence[str]) -> dict[str, int]:
    """`base=3` -> {"base": 3}; raises UserError."""
    found = {}
    for text in counts:
        name, _, count = text.partition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise UserError(f"{text!r} is not NAME=COUNT with a count of at least 1: give one such as base=2")
        found[name] = int(count)
    return found


def run(address: str, counts: dict[str, int], wait_s: float) -> None:
    from mavis_dist.tables import text_table
    from serve.dashboard import Dashboard

    dashboard = Dashboard(address)
    running = dashboard.replicas()
    if not running:
        raise UserError(f"no service of this project runs on the cluster of {address}: start one, jobs.serve")
    for name in counts:
        if name not in running:
            raise UserError(f"{name!r} has no replicas of its own: there are {', '.join(running)}")
    for name, count in counts.items():
        dashboard.scale(name, count)
    if counts:
        running = wait(dashboard, counts, wait_s)
    rows = [[one.name, str(one.running), str(one.target), one.status.lower()] for one in running.values()]
    print(text_table(["replicas of", "running", "target", "status"], rows, [max(map(len, running)), 9, 8, 12]))


def wait(dashboard: Dashboard, counts: dict[str, int], limit_s: float) -> dict[str, Scaled]:
    """Wait until so many replicas run; raises UserError with the reason if they do not within the limit."""
    from mavis_dist.progress import Meter

    began, meter = time.monotonic(), Meter(STAGE, "replicas")
    while True:
        found = dashboard.replicas()
        late = [name for name, count in counts.items() if found[name].running != count or found[name].target != count]
        meter.show(sum(found[name].running for name in counts), sum(counts.values()), ", ".join(late), final=not late)
        if not late:
            return found
        if time.monotonic() - began > limit_s:
            one = found[late[0]]
            reason = one.message or one.status.lower()
            raise UserError(
                f"{one.running} of {counts[one.name]} replicas of {one.name!r} run after {limit_s:g} s ({reason}): add "
                "machines, or ask for fewer; what was asked for stays asked for"
            )
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
