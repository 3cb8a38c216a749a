"""The command line of all jobs. Loads neither torch nor ray, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn, TypeVar

from packaging.requirements import Requirement

from mavis_dist import config as config_module
from mavis_dist import environment
from mavis_dist.config import Config
from mavis_dist.types import Stopped, UserError

T = TypeVar("T")
STOPPED = 128 + 15  # exit code of a process that SIGTERM ended


def parse(job: str, purpose: str, argv: Sequence[str] | None = None) -> Config:
    """The checked config of a job; ends the process with one line and exit code 2 if it is invalid."""
    return config_of(parser(job, purpose).parse_args(argv))


def parser(job: str, purpose: str) -> argparse.ArgumentParser:
    """The command line of a job that reads a config."""
    made = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}",
        description=purpose,
        epilog=f"config keys:\n{config_module.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", required=True, metavar="FILE", help="YAML file with the keys below")
    made.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that override the file")
    return made


def config_of(arguments: argparse.Namespace) -> Config:
    """The config of a parsed command line, checked as in `parse`."""
    return refusing(lambda: config_module.load(arguments.config, arguments.overrides))


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Options of commands that compare methods: `answers`, a Path or None, and `sources`, a list of Paths."""
    parser.add_argument("--answers", type=Path, metavar="FILE", help="also keep all answers in this parquet file")
    files = "make the figures from such files instead of the run; several are put side by side"
    parser.add_argument("--from", dest="sources", type=_paths, default=[], metavar="FILE,FILE", help=files)


def add_dashboard(parser: argparse.ArgumentParser) -> None:
    """The address of Ray's dashboard."""
    text = "default: RAY_API_SERVER_ADDRESS, or else %(default)s"
    parser.add_argument("--dashboard", default=environment.dashboard(), metavar="URL", help=text)


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",") if part]


def refusing(function: Callable[[], T]) -> T:
    """Run a job; a UserError ends the process with one line and exit code 2, a signal with exit code 143."""
    try:
        return function()
    except UserError as error:
        fail(error)
    except ModuleNotFoundError as error:
        if not _is_for_training(error.name or ""):
            raise
        fail(UserError(f"{error.name} is not installed: training needs more, pip install 'mavis-dist[train]'"))
    except Stopped:
        print("stopped: finished work is saved, the same command resumes from there", file=sys.stderr)
        raise SystemExit(STOPPED) from None


def _is_for_training(module: str) -> bool:
    """Whether a module belongs to a package that the extra [train] installs and serving does without."""
    extras = {"train", "report"}
    required = [Requirement(text) for text in metadata.requires("mavis-dist") or ()]
    optional = {r.name.lower() for r in required if r.marker and any(r.marker.evaluate({"extra": x}) for x in extras)}
    return module.partition(".")[0].lower() in optional - {"ray", "mavis-dist"}


def fail(error: Exception) -> NoReturn:
    original = getattr(error, "cause", error)  # errors of other processes come wrapped in their traceback
    print(f"error: {' '.join(str(original).split())}", file=sys.stderr)
    raise SystemExit(2)
