"""The training pipeline: from prompts to published value models and an evaluation.

python -m jobs.pipeline --config jobs/configs/quickstart.yaml [dotted.key=value ...]
ray job submit --working-dir . -- python -m jobs.pipeline --config jobs/configs/quickstart.yaml storage=/shared/runs
"""

from __future__ import annotations

from jobs import arguments
from mavis_dist.config import Config


def main() -> None:
    config = arguments.parse("pipeline", "Grow trees, label them, train value models, evaluate, publish.")
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist import cluster, pipeline
    from mavis_dist.evaluate.sweep import table

    cluster.connect()
    print(table(pipeline.run(config)))


if __name__ == "__main__":
    main()
