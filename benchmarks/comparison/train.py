"""Trains the policies that value-guided decoding is compared with, on the prompts and rewards of a run.

    python -m benchmarks.comparison.train --config jobs/configs/study.yaml [--policies NAMES] [dotted.key=value ...]

The run must have its labelled trees (`jobs.pipeline`): they define the scale of the rewards, and DPO learns from them.
Finished policies are skipped, and the same command resumes a killed training from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

import mavis_dist.environment  # noqa: F401  the same OpenMP waiting as in the actors
from benchmarks.common import command
from benchmarks.comparison.policies import DPO, KLS, RL, PolicySpec, Settings, catalogue, chosen
from jobs.arguments import refusing
from mavis_dist import config as config_module
from mavis_dist.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison.train",
        description="Train policies by RL and DPO on the prompts and rewards of a run.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, as for jobs.pipeline")
    names = "names or patterns such as rl-* (default: all)"
    parser.add_argument("--policies", type=command.words, metavar="A,B,...", help=names)
    kls = "prices of a nat in standard deviations of reward, for RL (default: %(default)s)"
    parser.add_argument("--rl-kls", type=_numbers, default=f"{KLS[RL]:g}", help=kls)
    parser.add_argument("--dpo-kls", type=_numbers, default=f"{KLS[DPO]:g}", help="DPO's beta (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=_numbers,
        default="0.25,0.5,0.75",
        help="weights of the first objective of every pair for MORLHF (default: %(default)s)",
    )
    parser.add_argument("--tag", default="", help="end of the policies' names, for a round with other settings")
    parser.add_argument("--list", action="store_true", help="print the policies and train nothing")
    for field in fields(Settings):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        text = f"{field.metadata['meaning']} (default: {default})"
        parser.add_argument(option, type=type(default), default=default, help=text)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_args(argv)
    config = refusing(lambda: config_module.load(arguments.config, arguments.overrides))
    specs = catalogue(list(config.objectives), arguments.rl_kls, arguments.dpo_kls, arguments.weights, arguments.tag)
    wanted = refusing(lambda: chosen(specs, arguments.policies))
    if arguments.list:
        print("\n".join(spec.name for spec in wanted))
        return
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    refusing(lambda: train_all(wanted, settings, config))


def train_all(specs: Sequence[PolicySpec], settings: Settings, config: Config) -> None:
    """Train policies one after the other.

    Raises:
        UserError: the config is not that of the run, or a policy was trained with other settings.
    """
    from benchmarks.comparison.fit import train_policy
    from mavis_dist.progress import say
    from mavis_dist.run_state import check_same_run
    from mavis_dist.store.files import Store

    store = Store(config.storage, config.run)
    check_same_run(store, config)
    for number, spec in enumerate(specs, 1):
        say("policies", f"{number}/{len(specs)}: {spec.name}")
        train_policy(spec, settings, config, store)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in command.words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.2,0.5") from None


if __name__ == "__main__":
    main()
