"""Run a job on a cluster through Ray's Jobs API, and follow it.

    python -m jobs.submit pipeline --config my.yaml storage=s3://bucket/runs
    python -m jobs.submit --stop pipeline --config my.yaml

A job has a fixed name, such as pipeline-my_run. Submitted again, it is followed if it runs, is a success if it was one
with the same settings, and resumes if it failed or was stopped. Ctrl-C ends the following, not the job. `--stop` lets
it save its work first. The checkout travels with the job, without what .gitignore names; the config has to be in it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from jobs import arguments
from mavis_dist import config as config_module
from mavis_dist.config import Config
from mavis_dist.progress import say
from mavis_dist.types import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("pipeline", "distill", "evaluate", "serve", "quickstart", "check")
EXCLUDED = [".git"]  # .gitignore names the rest
# That a stopped job has to save its work; Ray's own limit is 3.
STOP_S = 120
FAILED = 1
REPEATED = ("serve", "check")  # jobs that have something to do whenever they are submitted
SETTINGS = "settings"  # key of a job's metadata: a hash of its command and config
# What Ray's client raises where the dashboard does not answer, or not as it should.
BROKEN = (RuntimeError, OSError, aiohttp.ClientError)
RETRY_S, GONE_S = 5.0, 300.0  # between two tries to reach the dashboard, and until it is given up
GOES_ON = "goes on; --stop stops it, the same command follows it again"
ACTIVE = ("PENDING", "RUNNING")  # statuses of a job that has not ended


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit", description="Run a job on a cluster through Ray's Jobs API, and follow it."
    )
    arguments.add_dashboard(parser)
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("--stop", action="store_true", help="stop the job of this name, which saves its work")
    parser.add_argument("--again", action="store_true", help="run a finished job again")
    parser.add_argument("--python", default="python", metavar="PATH", help="Python of the cluster's machines")
    parser.add_argument("job", choices=JOBS, help="the job")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, in this checkout")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that override the file")
    given = parser.parse_args(argv)
    raise SystemExit(arguments.refusing(lambda: run(given)))


def run(given: argparse.Namespace) -> int:
    """The exit code of the job, as far as it is known.

    Raises:
        UserError: a job of this name runs with other settings, or the cluster does not take it.
    """
    config = config_module.load(given.config, given.overrides)
    name, command = f"{given.job}-{config.run}", entrypoint(given)
    client, settings = connect(given.dashboard), settings_of(command, config)
    found = known(client, name)
    if given.stop:
        return stop(client, name, found)
    is_same = found is not None and (found.metadata or {}).get(SETTINGS) == settings
    if found is not None and found.status in ACTIVE:
        if not is_same:
            raise UserError(
                f"{name} runs with other settings: wait for it, stop it with --stop, or choose another name with "
                "run=NAME"
            )
        say(name, "runs already")
    elif found is not None and found.status == "SUCCEEDED" and is_same and not (given.again or given.job in REPEATED):
        say(name, "finished before; --again runs it again")
        return 0
    else:
        if found is not None:
            with in_one_line(name):
                client.delete_job(name)  # frees the name; the run's results are in its storage
        submit(client, name, command, settings)
        say(name, "submitted" if found is None else "resumes")
    return 0 if given.no_wait else follow(client, name)


def entrypoint(given: argparse.Namespace) -> str:
    """The command of the job, in the checkout that travels with it; raises UserError."""
    try:
        file = Path(given.config).resolve().relative_to(ROOT)
    except ValueError:
        raise UserError(
            f"--config {given.config!r} is outside of {ROOT}, which travels with the job: put the file there"
        ) from None
    return shlex.join([given.python, "-m", f"jobs.{given.job}", "--config", str(file), *given.overrides])


def settings_of(command: str, config: Config) -> str:
    """A hash of all that decides what a job does; the config's file may change under the same command."""
    return hashlib.sha256(f"{command}\n{config.model_dump_json()}".encode()).hexdigest()


def connect(address: str) -> JobSubmissionClient:
    """Raises UserError."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--dashboard {address} cannot be used ({one_line(error, 300)}): give the address that `ray start --head` "
            "or `ray dashboard` prints, and set RAY_AUTH_MODE=token with the cluster's token"
        ) from None


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """What goes wrong with the dashboard, as a UserError."""
    try:
        yield
    except BROKEN as error:
        raise UserError(
            f"{name}: the cluster's dashboard refuses, or does not answer: {one_line(error, 300)}"
        ) from None


def known(client: JobSubmissionClient, name: str) -> JobDetails | None:
    """The job of this name; None if there is none. Raises UserError."""
    with in_one_line(name):
        try:
            return client.get_job_info(name)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise


def submit(client: JobSubmissionClient, name: str, command: str, settings: str) -> None:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "PYTHONUNBUFFERED": "1"}
    runtime_env: dict[str, Any] = {"working_dir": str(ROOT), "excludes": EXCLUDED, "env_vars": variables}
    with in_one_line(name):
        client.submit_job(
            entrypoint=command, submission_id=name, runtime_env=runtime_env, metadata={SETTINGS: settings}
        )


def stop(client: JobSubmissionClient, name: str, found: JobDetails | None) -> int:
    if found is None or found.status not in ACTIVE:
        say(name, "does not run" if found is None else f"does not run any more ({found.status.lower()})")
        return 0
    with in_one_line(name):
        client.stop_job(name)
    say(name, f"stops within {STOP_S} s, once its work is saved; submit it again to resume")
    return 0


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the log of a job until it ends; 0 if it succeeded.

    Raises:
        UserError: the dashboard does not answer for GONE_S.
    """
    printed, found = 0, None
    try:
        while True:
            printed = asyncio.run(_print_log(client, name, printed))
            found = _wait_for_answer(client, name)
            if found is None or found.status not in ACTIVE:
                break
            time.sleep(RETRY_S)  # only the connection has ended
    except KeyboardInterrupt:
        say(name, GOES_ON)
        return 130
    say(name, "lost" if found is None else f"{found.status.lower()}: {one_line(found.message or '', 300)}")
    return 0 if found is not None and found.status == "SUCCEEDED" else FAILED


async def _print_log(client: JobSubmissionClient, name: str, printed: int) -> int:
    """Print a job's log but for as many characters, until it or the connection ends; returns its characters so far."""
    length = 0
    with suppress(*BROKEN):
        async for text in client.tail_job_logs(name):
            print(text[max(0, printed - length) :], end="", flush=True)
            length += len(text)
    return max(length, printed)


def _wait_for_answer(client: JobSubmissionClient, name: str) -> JobDetails | None:
    until = time.monotonic() + GONE_S
    while True:
        try:
            return known(client, name)
        except UserError as error:
            if time.monotonic() > until:
                raise UserError(f"{error}; {name} {GOES_ON}") from None
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
