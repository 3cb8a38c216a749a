"""Distil the published value models of a finished run into one model for all objectives.

python -m jobs.distill --config jobs/configs/quickstart.yaml [dotted.key=value ...]
"""

from __future__ import annotations

from collections.abc import Mapping

from jobs import arguments
from mavis_dist.config import Config
from mavis_dist.progress import say
from mavis_dist.store import layout
from mavis_dist.tables import text_table

COLUMNS = {
    "teacher EV": "teacher_explained_variance",
    "student EV": "student_explained_variance",
    "ratio": "ratio",
    "R2 V": "r2_values",
    "R2 V(sa)-V(s)": "r2_differences",
    "R2 qhead": "r2_deltas",
}


def main() -> None:
    config = arguments.parse("distill", "Distil the published value models of a run into one model.")
    arguments.refusing(lambda: run(config))


def run(config: Config) -> None:
    from mavis_dist import cluster
    from mavis_dist.actors import start_progress_actor
    from mavis_dist.evaluate.collect import timed
    from mavis_dist.plan import check_training
    from mavis_dist.prompts import held_out, load_prompts
    from mavis_dist.run_state import check_machines, check_same_run
    from mavis_dist.store import values
    from mavis_dist.store.files import Store
    from mavis_dist.train.distill.job import plan_job
    from mavis_dist.train.launch import distill

    check_same_run(Store(config.storage, config.run), config)
    prompts, _ = load_prompts(config.prompts, config.seed)
    job = plan_job(config, frozenset(prompt.id for prompt in held_out(config.prompts, prompts)))
    folder = layout.distilled_folder(job.name)
    if job.store.metadata(folder) is None:
        cluster.connect()
        with cluster.stop_on_signals():
            check_training(config, cluster.nodes())
            check_machines(job.store, config, is_distilling=True)
            with timed(job.store, folder, f"{len(job.teachers)} objectives"):
                distill(job, start_progress_actor())
    else:
        say("distill", f"{folder} finished before, skipped")
    served = job.name if config.distill.publish else None
    for teacher in job.teachers:
        values.publish_distilled(job.store, teacher.objective, teacher.iteration, served)
    metadata = job.store.metadata(folder)
    assert metadata is not None
    print(f"{table(metadata['figures'])}\n{job.store.root}/{folder}")


def table(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """One line per objective: R² of the targets (EV, explained variance) on validation trees, and R² to the teacher."""
    rows = []
    for objective, row in figures.items():
        teacher, student = row["teacher_explained_variance"], row["student_explained_variance"]
        known = {**row, "ratio": student / teacher if teacher and student is not None else None}
        cells = [known[key] for key in COLUMNS.values()]
        rows.append([objective, *("-" if x is None else f"{x:.3f}" for x in cells)])
    return text_table(["objective", *COLUMNS], rows, [24, *[14] * len(COLUMNS)])


if __name__ == "__main__":
    main()
