"""Run a job on a cluster through Ray's Jobs API, and follow it.

    python -m jobs.submit pipeline --config my.yaml storage=s3://bucket/runs
    python -m jobs.submit --stop pipeline --config my.yaml

A job has a fixed name, such as pipeline-my_run. Submitted again, it is followed if it runs, is a success if it was one,
and resumes if it failed or was stopped. Ctrl-C ends the following, not the job. `--stop` lets it save its work first.
The checkout travels with the job, without what .gitignore names; the config has to be in it.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import arguments
from mavis_dist import config as config_module
from mavis_dist.progress import say
from mavis_dist.types import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("pipeline", "distill", "evaluate", "serve", "quickstart", "check")
EXCLUDED = [".git"]  # .gitignore names the rest
# That a stopped job has to save its work; Ray's own limit is 3.
STOP_S = 120
FAILED = 1
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
    """The exit code of the job, as far as it is known."""
    config = config_module.load(given.config, given.overrides)
    name, command = f"{given.job}-{config.run}", entrypoint(given)
    client = connect(given.dashboard)
    status = known(client, name)
    if given.stop:
        return stop(client, name, status)
    if status == "SUCCEEDED" and not given.again:
        say(name, "finished before; --again runs it again")
        return 0
    if status not in ACTIVE:
        if status is not None:
            client.delete_job(name)  # frees the name; the run's results are in its storage
        submit(client, name, command)
    say(name, "submitted" if status is None else "runs already" if status in ACTIVE else "resumes")
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


def known(client: JobSubmissionClient, name: str) -> str | None:
    """The status of a job of this name; None if there is none."""
    try:
        return str(client.get_job_status(name).value)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise UserError(f"{name}: {one_line(error, 300)}") from None


def submit(client: JobSubmissionClient, name: str, command: str) -> None:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "PYTHONUNBUFFERED": "1"}
    runtime_env: dict[str, Any] = {"working_dir": str(ROOT), "excludes": EXCLUDED, "env_vars": variables}
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env=runtime_env)
    except RuntimeError as error:
        raise UserError(f"{name} cannot be submitted: {one_line(error, 300)}") from None


def stop(client: JobSubmissionClient, name: str, status: str | None) -> int:
    if status not in ACTIVE:
        say(name, "does not run" if status is None else f"does not run any more ({status.lower()})")
        return 0
    client.stop_job(name)
    say(name, f"stops within {STOP_S} s, once its work is saved; submit it again to resume")
    return 0


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the log of a job until it ends; 0 if it succeeded."""
    try:
        asyncio.run(_print_log(client, name))
    except KeyboardInterrupt:
        say(name, "goes on; --stop stops it, the same command follows it again")
        return 130
    status = known(client, name)
    message = client.get_job_info(name).message or ""
    say(name, f"{(status or 'lost').lower()}: {one_line(message, 300)}")
    return 0 if status == "SUCCEEDED" else FAILED


async def _print_log(client: JobSubmissionClient, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
