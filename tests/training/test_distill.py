"""A whole distillation on real DeepSpeed with one worker and without Ray: trained, stored, published, extended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from jobs.distill import run, table
from mavis_dist.config import Config, load
from mavis_dist.decode import Engine, Request, SamplingParams, Scorer
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.evaluate.collect import stage_seconds
from mavis_dist.models import qhead, value
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.models.states import first_layers
from mavis_dist.plan import Node
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.layout import label_folder
from mavis_dist.store.shards import Labels, write_labels
from mavis_dist.train.distill import job as job_module
from mavis_dist.train.distill.job import DistillError, DistillJob, distill, plan_job
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import Policy, Stopped
from tests import tiny
from tests.training.stored import store_trees

NAMES = ("first", "second", "third")
ON_STATES = ("fourth", "fifth", "sixth")  # heads on the base model's states
SHARED = ("seventh", "eighth")  # heads of one value model
HELD_OUT = frozenset({"p0", "p1"})


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Settings for tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        for name, number in {"LEARNING_RATE": 3e-3, "QHEAD_STEPS": 300, "STATES": 8, "RANK": 8}.items():
            patch.setattr(job_module, name, number)
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees of a tiny model and three published value models with random weights."""
    folder = tmp_path_factory.mktemp("distill")
    tiny.write_base(folder, eos_weight=1.0)
    tiny.write_models(folder, "run", NAMES)
    base = load_base(str(tiny.write_base(folder, eos_weight=1.0)))
    reward = {"reward": "function", "path": "tests.tiny:count_vowels"}
    settings = {
        "run": "run",
        "storage": str(folder / "runs"),
        "objectives": dict.fromkeys((*NAMES, *ON_STATES, *SHARED), reward),
        "base": {"model": str(folder / tiny.MODEL), "dtype": "float32"},
        "rollout": {"first": {"root": 2, "children": 2, "layers": 2}, "max_tokens": 12},
        "train": {"trees_per_step": 4},
        "distill": {"epochs": 12, "layers": 1},
    }
    store = Store(settings["storage"], "run")
    trees = store_trees(store, base, 24)
    labels = [Labels(t.prompt_id, t.leaves(), 1.0 * t.leaves()) for t in trees]
    for name in (*NAMES, *ON_STATES):
        write_labels(store, f"{label_folder(Policy(), name)}/part-00000.parquet", labels)
        store.finish(label_folder(Policy(), name), {})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def publish_heads(folder: Path, base: BaseModel, name: str, seed: int) -> None:
    """A value model with random heads on the states of the base model's first layer."""
    store = Store(str(folder / "runs"), "run")
    torch.manual_seed(seed)
    model = value.ValueModel(first_layers(base.model, 1), 1)
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    card = value.load_card(values.fetch(store, NAMES[0], 0))
    card = replace(card, objectives=(name,), state_layer=1, base_fingerprint=base.fingerprint)
    value.save(model, card, folder / "work" / name)
    store.upload(folder / "work" / name, layout.value_folder(name, 0), {})
    values.publish(store, name, 0)


def of(config_file: Path, names: tuple[str, ...], *overrides: str) -> Config:
    config = load(config_file, overrides)
    return config.model_copy(update={"objectives": {name: config.objectives[name] for name in names}})


@pytest.fixture(scope="module")
def two(config_file: Path) -> DistillJob:
    """The first two objectives, distilled."""
    job = plan_job(of(config_file, NAMES[:2]), HELD_OUT)
    distill(job, WorkerGroup())
    return job


def loaded(job: DistillJob) -> tuple[qhead.Student, value.Card]:
    folder = values.fetch_folder(job.store, layout.distilled_folder(job.name))
    model, card = value.load(folder)
    return qhead.load(folder, model), card


def test_a_trunk_from_the_base_model_learns_both_teachers(two: DistillJob) -> None:
    metadata = two.store.metadata(layout.distilled_folder(two.name))
    assert metadata is not None
    assert set(metadata["figures"]) == set(NAMES[:2])
    for row in metadata["figures"].values():
        assert row["r2_values"] > 0.6
        assert row["r2_deltas"] > 0.3
        assert row["teacher_explained_variance"] is not None
    assert len(table(metadata["figures"]).splitlines()) == 4


def test_the_time_of_a_distillation_is_recorded(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of(config_file, NAMES[:2], "distill.epochs=1", "distill.publish=false")
    for name in ("cluster.connect", "run_state.check_same_run", "run_state.check_machines"):
        monkeypatch.setattr(f"mavis_dist.{name}", lambda *arguments, **options: None)
    monkeypatch.setattr("mavis_dist.cluster.nodes", lambda: [Node(4)])
    monkeypatch.setattr("mavis_dist.actors.start_progress_actor", lambda: None)
    monkeypatch.setattr(
        "mavis_dist.train.launch.distill",
        lambda job, progress: job.store.finish(layout.distilled_folder(job.name), {"figures": {}}),
    )
    run(config)
    [seconds] = stage_seconds(Store(config.storage, config.run), ("distilled/",)).values()
    assert seconds > 0


def test_the_card_names_the_teachers_and_a_changed_teacher_is_another_distillation(two: DistillJob) -> None:
    _, card = loaded(two)
    assert [(t.objective, t.iteration) for t in card.teachers] == [("first", 0), ("second", 0)]
    assert plan_job(two.config, HELD_OUT).name == two.name
    folder = values.fetch(two.store, "first", 0)
    model, teacher_card = value.load(folder)
    before = (folder / "model.safetensors").read_bytes()
    model.heads.bias.add_(1.0)
    value.save(model, teacher_card, folder)
    try:
        assert plan_job(two.config, HELD_OUT).name != two.name
        with pytest.raises(DistillError, match="'first' is not the one"):
            plan_job(of_extended(two, NAMES[:2]), HELD_OUT)
    finally:
        (folder / "model.safetensors").write_bytes(before)


def of_extended(job: DistillJob, names: tuple[str, ...]) -> Config:
    config = job.config
    reward = config.objectives[NAMES[0]]
    extending = config.distill.model_copy(update={"extends": job.name})
    return config.model_copy(update={"objectives": dict.fromkeys(names, reward), "distill": extending})


def test_adding_an_objective_does_not_change_the_others(two: DistillJob) -> None:
    with pytest.raises(DistillError, match="has all of the run's objectives"):
        plan_job(of_extended(two, NAMES[:2]), HELD_OUT)
    job = plan_job(of_extended(two, NAMES), HELD_OUT)
    distill(job, WorkerGroup())
    (before, _), (after, card) = loaded(two), loaded(job)
    assert card.objectives == NAMES
    grown = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(grown[name][:2] if name.startswith("model.heads") else grown[name], tensor), name
    inputs = torch.tensor([[5, 6, 7, 8, 9, 10]])
    old_values, old_queries = before.split(before(input_ids=inputs))
    new_values, new_queries = after.split(after(input_ids=inputs))
    assert torch.equal(new_values[..., :2], old_values)
    assert torch.equal(new_queries[..., :2, :], old_queries)
    metadata = job.store.metadata(layout.distilled_folder(job.name))
    assert metadata is not None
    assert metadata["figures"]["third"]["r2_values"] > 0.1  # from a trunk that was trained for the others
    old_metadata = two.store.metadata(layout.distilled_folder(two.name))
    assert old_metadata is not None
    assert {name: metadata["figures"][name] for name in NAMES[:2]} == old_metadata["figures"]


def test_published_objectives_share_the_trunk_and_qhead_is_served(two: DistillJob) -> None:
    store = two.store
    for name in NAMES[:2]:
        values.publish_distilled(store, name, 0, two.name)
        values.publish(store, name, 0)  # as a pipeline that finds everything finished does
    assert values.published(store) == dict.fromkeys(NAMES, 0)
    folders = fetch_published(store)
    assert folders["first"] == folders["second"] != folders["third"]
    guide = load_guide(folders)
    assert set(guide.predicted) == set(NAMES[:2])
    base = load_base(two.config.base.model)
    asked = Request("1", (5, 6, 7), {"first": 1.0}, params=SamplingParams(max_tokens=5, seed=0), scorer=Scorer.QHEAD)
    [[choice]] = Engine(base, guide).generate([asked])
    assert choice.error is None
    with pytest.raises(StoreError, match="'nothing' is not finished"):
        values.publish_distilled(store, "first", 0, "nothing")
    values.publish_distilled(store, "first", 0, None)
    assert values.published_folders(store)["first"] == layout.value_folder("first", 0)


def test_a_student_on_the_base_models_states_has_the_teachers_heads_and_learns_their_differences(
    config_file: Path,
) -> None:
    base = load_base(str(config_file.parent / tiny.MODEL))
    for seed, name in enumerate(ON_STATES):
        publish_heads(config_file.parent, base, name, seed)
    job = plan_job(of(config_file, ON_STATES[:2], "distill.layers=null"), HELD_OUT)
    distill(job, WorkerGroup())
    more = plan_job(of(config_file, ON_STATES, "distill.layers=null", f"distill.extends={job.name}"), HELD_OUT)
    distill(more, WorkerGroup())
    for done, names in ((job, ON_STATES[:2]), (more, ON_STATES)):
        folder = values.fetch_folder(done.store, layout.distilled_folder(done.name))
        model, card = value.load(folder, base=base)
        student = qhead.load(folder, model, card.state_layer)
        assert card.state_layer == student.state_layer == 1
        teachers = [value.load(values.fetch(done.store, name, 0), base=base)[0] for name in names]
        assert all(teacher.backbone is model.backbone for teacher in teachers)
        assert torch.equal(model.heads.weight, torch.cat([teacher.heads.weight for teacher in teachers]))
        metadata = done.store.metadata(layout.distilled_folder(done.name))
        assert metadata is not None
        for row in metadata["figures"].values():
            assert row["r2_values"] == pytest.approx(1.0, abs=1e-4)
            assert row["r2_deltas"] > 0.3
    guide = load_guide(dict.fromkeys(ON_STATES, folder), base=base)
    request = Request("1", (5, 6, 7), dict.fromkeys(ON_STATES, 1.0), 4.0, None, SamplingParams(8, seed=1))
    [[exact]] = Engine(base, guide).generate([replace(request, scorer=Scorer.FULL)])
    [[predicted]] = Engine(base, guide).generate([replace(request, scorer=Scorer.QHEAD)])
    assert guide.reads_states
    assert predicted.values.keys() == exact.values.keys() == set(ON_STATES)


def test_objectives_of_one_value_model_are_labelled_in_one_pass(config_file: Path) -> None:
    base, store = load_base(str(config_file.parent / tiny.MODEL)), Store(str(config_file.parent / "runs"), "run")
    tiny.publish_shared(store, config_file.parent, SHARED, like=NAMES[0])
    job = plan_job(of(config_file, (NAMES[0], *SHARED)), HELD_OUT)
    alone, first, second = job_module.load_teachers(job, base)
    assert alone[0] is not first[0]
    assert first[0] is second[0]
    inputs = torch.tensor([[5, 6, 7, 8, 9, 10]])
    for teacher, (model, head) in zip(job.teachers, (alone, first, second), strict=True):
        expected, _ = job_module.load_teacher(store, teacher, base)
        assert torch.equal(model(input_ids=inputs)[..., head], expected(input_ids=inputs)[..., 0])


class Attempt:
    """A distillation that is asked to stop once a part of its work is so far, and what it has posted of each part."""

    def __init__(self, job: DistillJob, part: str = "", steps: int = 0):
        self.posted: dict[str, list[int]] = {}
        group = WorkerGroup(progress=self._post, wants_stop=lambda: steps in self.posted.get(part, []))
        if part:
            with pytest.raises(Stopped):
                distill(job, group)
        else:
            distill(job, group)

    def _post(self, part: str, done: int, total: int, text: str) -> None:
        self.posted.setdefault(part, []).append(done)


def test_a_stopped_distillation_continues_to_the_same_model(config_file: Path) -> None:
    job = plan_job(of(config_file, NAMES[:2], "distill.epochs=3"), HELD_OUT)
    folder, unfinished = (
        Path(job.store.root) / path(job.name) for path in (layout.distilled_folder, layout.distilling_folder)
    )
    num_trees, num_stored = 24, job_module.TREES_PER_PART

    def result() -> dict[str, bytes]:
        found = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        assert len(found) == 2
        job.store.delete(layout.distilled_folder(job.name))
        return found

    undisturbed = Attempt(job)
    assert undisturbed.posted["labels"] == list(range(1, num_trees + 1))
    steps = undisturbed.posted["trunk"]
    expected = result()
    assert not unfinished.exists()

    Attempt(job, "labels", num_stored + 2)
    again = Attempt(job, "trunk", 5)
    assert again.posted["labels"] == list(range(num_stored + 1, num_trees + 1))
    [damaged, _] = sorted(unfinished.glob("labels/*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    last = Attempt(job)
    assert last.posted["labels"] == list(range(1, num_stored + 1))
    assert last.posted["trunk"] == steps[5:]
    assert not unfinished.exists()
    assert result() == expected
