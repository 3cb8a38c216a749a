"""One distillation, from a stored run to a stored model: plan, labels, training, report.

No Ray: every worker calls `distill` in a process group that its caller has made.

Shapes: M objectives, C candidates.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mavis_dist.config import Config
from mavis_dist.core.tree import Tree
from mavis_dist.decode.load_guide import read_card
from mavis_dist.models import qhead, value
from mavis_dist.models.load import BaseModel, fetch, fingerprint_model, load_base
from mavis_dist.models.qhead import QHead, Student
from mavis_dist.models.value import Card, Teacher, ValueModel
from mavis_dist.store import layout, values
from mavis_dist.store.files import DamagedFile, Store
from mavis_dist.store.layout import rollout_folder
from mavis_dist.store.shards import read_teacher_values, read_trees, shard_names, write_teacher_values
from mavis_dist.train.checkpoints import Checkpoints
from mavis_dist.train.data import Fit, TreeSet, data_of
from mavis_dist.train.distill.fit import agreement, fit_heads, fit_qhead, fit_trunk, trunk_statistics
from mavis_dist.train.distill.labels import DistillLabels, Sampling, from_store, label_tree, to_store
from mavis_dist.train.fit import predict
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import Policy, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATE = 2e-4
QHEAD_LEARNING_RATE = 1e-3  # the QHead is small and sees many candidates per step
QHEAD_STEPS = 600
RANK = 64  # of the QHead
STATES, CANDIDATES = 24, 8  # per tree, and per state
TREES_PER_PART = 16  # whose labels are stored together: what a stop loses at most


class DistillError(UserError):
    """A distillation that cannot be done."""


@dataclass(frozen=True)
class DistillJob:
    """One distillation."""

    config: Config
    teachers: tuple[Teacher, ...]  # those of the extended model first
    validation_ids: frozenset[str]  # prompts whose trees validate and do not train

    @property
    def name(self) -> str:
        """A hash of everything that the result depends on, so that a finished model is never overwritten."""
        settings = self.config.distill.model_dump(exclude={"publish"})
        inputs = [settings, [asdict(teacher) for teacher in self.teachers]]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def store(self) -> Store:
        return Store(self.config.storage, self.config.run)

    @property
    def num_old(self) -> int:
        """Number of objectives of the extended model, whose heads do not change."""
        extended = self.config.distill.extends
        return 0 if extended is None else len(_extended_card(self.store, extended).teachers)


def plan_job(config: Config, validation_ids: frozenset[str]) -> DistillJob:
    """The distillation of the published value models of a config's objectives.

    Raises:
        DistillError: if several processes share the base model, an objective has no published value model, or the
            extended model has nothing to add or was distilled from other teachers.
    """
    if config.base.tensor_parallel > 1:
        raise DistillError(
            f"base.tensor_parallel={config.base.tensor_parallel}: distillation reads the base model in one process; "
            "give base.tensor_parallel=1 if it fits, or serve the value models as they are"
        )
    store = Store(config.storage, config.run)
    iterations = values.published(store)
    for name in config.objectives:
        if name not in iterations:
            raise DistillError(f"no value model of {name!r} is published in {store.root}: run the pipeline first")
    teachers = {
        name: Teacher(name, iterations[name], fingerprint_model(values.fetch(store, name, iterations[name])))
        for name in config.objectives
    }
    old: tuple[Teacher, ...] = ()
    if config.distill.extends is not None:
        old = _extended_card(store, config.distill.extends).teachers
        for teacher in old:
            if teachers.get(teacher.objective) != teacher:
                raise DistillError(
                    f"distill.extends={config.distill.extends}: the value model of {teacher.objective!r} is not the "
                    f"one it was distilled from: leave distill.extends out"
                )
        if len(old) == len(teachers):
            raise DistillError(
                f"distill.extends={config.distill.extends} has all of the run's objectives: leave distill.extends out"
            )
    return DistillJob(config, (*old, *(t for t in teachers.values() if t not in old)), validation_ids)


def distill(job: DistillJob, group: WorkerGroup) -> None:
    """Label, train, evaluate and store the distilled model. Call it on all workers of a process group.

    Resumes from the labels and the newest checkpoint of the trunk of an earlier attempt.

    Raises:
        Stopped: the driver has asked for a stop.
    """
    config, store = job.config, job.store
    torch.manual_seed(config.seed)
    base = load_base(config.base.model, config.base.dtype, config.base.device)
    trees = stored_trees(store, job.teachers)
    labels = labels_of(job, base, trees, group)
    training = [label for label in labels if label.tree.prompt_id not in job.validation_ids]

    student, layer = train(job, base, training, group)
    if group.rank == 0:
        validation = [label for label in labels if label.tree.prompt_id in job.validation_ids]
        figures = report(job, base, student, validation)
        store_student(job, student, layer, {"figures": figures})
        store.delete(layout.distilling_folder(job.name))


def stored_trees(store: Store, teachers: Sequence[Teacher]) -> list[Tree]:
    """Trees of the base policy, and of every later policy up to the teachers' own."""
    later = [Policy(t.objective, i) for t in teachers for i in range(1, t.iteration + 1)]
    folders = [rollout_folder(policy) for policy in (Policy(), *later)]
    shards = [f"{folder}/{name}" for folder in folders for name in shard_names(store, folder)]
    return [tree for shard in shards for tree in read_trees(store, shard)]


def labels_of(job: DistillJob, base: BaseModel, trees: Sequence[Tree], group: WorkerGroup) -> list[DistillLabels]:
    """The teachers' labels of all trees, in order; every worker computes and stores a share of those not stored yet."""
    config, rollout = job.config, job.config.rollout
    teachers = cache(partial(load_teachers, job, base))  # needed only where labels are missing
    sampling = Sampling(STATES, CANDIDATES, rollout.top_k, rollout.top_p, rollout.min_p)
    parts = [trees[start : start + TREES_PER_PART] for start in range(0, len(trees), TREES_PER_PART)]
    numbers = range(group.rank, len(parts), group.size)
    num_trees = sum(len(parts[number]) for number in numbers)
    mine: dict[int, list[DistillLabels]] = {}

    def label(number: int) -> list[DistillLabels]:
        known = sum(map(len, mine.values()))
        found: list[DistillLabels] = []
        for tree in parts[number]:
            found.append(label_tree(base, teachers(), tree, sampling, config.seed))
            group.check_stop()
            group.progress("labels", known + len(found), num_trees, "")
        write_teacher_values(job.store, layout.teacher_value_file(job.name, number), [*map(to_store, found)])
        return found

    for number in numbers:
        mine[number] = stored_labels(job, number, parts[number]) or label(number)
    by_part = {number: found for share in group.gather(mine) for number, found in share.items()}
    return [one for number in range(len(parts)) for one in by_part[number]]


def stored_labels(job: DistillJob, part: int, trees: Sequence[Tree]) -> list[DistillLabels] | None:
    """What an earlier attempt has stored of some trees; None: nothing that can be used."""
    path = layout.teacher_value_file(job.name, part)
    if not job.store.exists(path):
        return None
    try:
        found = read_teacher_values(job.store, path)
    except DamagedFile:
        return None
    if [(one.prompt_id, one.policy) for one in found] != [(tree.prompt_id, tree.policy) for tree in trees]:
        return None
    return [from_store(tree, one, len(job.teachers)) for tree, one in zip(trees, found, strict=True)]


def load_teachers(job: DistillJob, base: BaseModel) -> list[tuple[ValueModel, int]]:
    """The teachers, each as a value model and one of its heads: those on the same states are heads of one model."""
    folders = {t.objective: values.fetch(job.store, t.objective, t.iteration) for t in job.teachers}
    loaded = {folder: value.load(folder, device=str(base.model.device), base=base) for folder in {*folders.values()}}
    by_backbone: dict[int, list[ValueModel]] = {}
    places = []
    for name, folder in folders.items():
        model, card = loaded[folder]
        parts = by_backbone.setdefault(id(model.backbone), [])
        places.append((id(model.backbone), len(parts)))
        parts.append(model.only(card.objectives.index(name)))
    joint = {backbone: value.joined(parts) for backbone, parts in by_backbone.items()}
    return [(joint[backbone], head) for backbone, head in places]


def load_teacher(store: Store, teacher: Teacher, base: BaseModel) -> tuple[ValueModel, Card]:
    folder = values.fetch(store, teacher.objective, teacher.iteration)
    return value.load_objective(folder, teacher.objective, device=str(base.model.device), base=base)


def train(
    job: DistillJob, base: BaseModel, labels: Sequence[DistillLabels], group: WorkerGroup
) -> tuple[Student, int | None]:
    """Run both phases on all workers; returns the finished student on each, and the layer of the base model that is its
    trunk. Such a trunk does not change, and its heads are the teachers': there only the QHead is trained.
    """
    config, device, first = job.config, job.config.base.device, job.num_old
    settings = config.train.model_copy(update={"learning_rate": LEARNING_RATE, "accumulation": 1})
    student, layer = initial_student(job, base)
    student.to(device)
    if first == 0 and layer is None:
        checkpoints = Checkpoints(job.store, layout.distilling_checkpoints(job.name), group, settings)
        trained = fit_trunk(student, labels, settings, config.distill.epochs, config.seed, group, checkpoints)
        student, _ = initial_student(job, base)  # under ZeRO 3 the parameters of the trained one are sharded
        unknown = student.load_state_dict(trained, strict=False).unexpected_keys  # embeddings are not trained
        assert not unknown, unknown
        student.to(device)
    student.eval().requires_grad_(False)
    statistics = trunk_statistics(student.model, labels, group)
    if layer is None:
        fit_heads(student.model, statistics, first)
    head_settings = settings.model_copy(update={"learning_rate": QHEAD_LEARNING_RATE})
    trainee = Student(student.model, copy.deepcopy(student.qhead))
    trained = fit_qhead(trainee, statistics, head_settings, QHEAD_STEPS, config.seed, group, first)
    unknown = student.qhead.load_state_dict(trained, strict=False).unexpected_keys  # nor are old objectives
    assert not unknown, unknown
    return student, layer


@torch.no_grad()
def initial_student(job: DistillJob, base: BaseModel) -> tuple[Student, int | None]:
    """The extended model with heads for the new objectives; else a trunk from the teachers or from the base model, with
    a QHead that predicts 0. And the layer of the base model that is the trunk; None: it has one of its own.
    """
    config, store = job.config, job.store
    layer = None
    if config.distill.extends is not None:
        folder = values.fetch_folder(store, layout.distilled_folder(config.distill.extends))
        model, card = value.load(folder, device=config.base.device, base=base)
        student = qhead.load(folder, model)
        for teacher in job.teachers[job.num_old :]:
            student.add_objective()
            if card.state_layer is not None:
                teacher_heads = load_teacher(store, teacher, base)[0].heads
                model.heads.weight[-1:], model.heads.bias[-1:] = teacher_heads.weight, teacher_heads.bias
        return student, card.state_layer
    if config.distill.layers is not None:
        model = value.from_base(fetch(config.base.model), config.distill.layers, len(job.teachers))
    else:
        models, cards = zip(*(load_teacher(store, teacher, base) for teacher in job.teachers), strict=True)
        layer = cards[0].state_layer
        model = average(models) if layer is None else with_heads(models[0].backbone, models)
    torch.manual_seed(config.seed)
    return Student(model, QHead(model.heads.in_features, len(job.teachers), RANK)), layer


@torch.no_grad()
def average(models: Sequence[ValueModel]) -> ValueModel:
    """The mean of trunks of common origin, with all heads of the models; raises DistillError if their shapes differ."""
    states = [model.backbone.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise DistillError("the value models differ in shape and have no average: set distill.layers=NUMBER")
    backbone = copy.deepcopy(models[0].backbone)
    backbone.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return with_heads(backbone, models)


@torch.no_grad()
def with_heads(backbone: PreTrainedModel, models: Sequence[ValueModel]) -> ValueModel:
    """A backbone with copies of all heads of some value models."""
    whole = ValueModel(backbone, len(models)).to(models[0].heads.weight.device)
    whole.heads.weight.copy_(torch.cat([model.heads.weight for model in models]))
    whole.heads.bias.copy_(torch.cat([model.heads.bias for model in models]))
    return whole


@torch.no_grad()
def report(
    job: DistillJob, base: BaseModel, student: Student, validation: Sequence[DistillLabels]
) -> dict[str, dict[str, float | None]]:
    """By objective, on validation trees: R² of teacher and student to the targets, and of the student to the teacher;
    None without validation trees.
    """
    agreements = agreement(student, validation)
    figures = {}
    for m, teacher in enumerate(job.teachers):
        model, card = load_teacher(job.store, teacher, base)
        fit = Fit((teacher.objective,), teacher.iteration, None, card.scales, job.validation_ids)
        [trees] = data_of(fit, job.config, job.store).validation

        figures[teacher.objective] = {
            "teacher_explained_variance": _r2(model, trees),
            "student_explained_variance": _r2(student.model.only(m), trees),
            **{name: None if r2_M is None else float(r2_M[m]) for name, r2_M in agreements.items()},
        }
    return figures


def _r2(model: ValueModel, trees: TreeSet) -> float | None:
    return predict(model, [trees])[0].r2 if len(trees) else None


def store_student(job: DistillJob, student: Student, layer: int | None, metadata: dict[str, Any]) -> None:
    """Store the student with its card; the marker holds `metadata`, with the report as `figures`."""
    store = job.store
    folders = {t.objective: values.fetch(store, t.objective, t.iteration) for t in job.teachers}
    cards = [value.load_card(folder).only(name) for name, folder in folders.items()]
    explained = [row["student_explained_variance"] for row in metadata["figures"].values()]
    known = [e for e in explained if e is not None]
    extended = job.config.distill.extends
    card = Card(
        objectives=tuple(t.objective for t in job.teachers),
        scales=tuple(card.scales[0] for card in cards),
        rewards=tuple(card.rewards[0] for card in cards),
        iteration=max(t.iteration for t in job.teachers),
        parent=None if extended is None else layout.distilled_folder(extended),
        base_fingerprint=cards[0].base_fingerprint,
        tokenizer_fingerprint=cards[0].tokenizer_fingerprint,
        max_tokens=min(card.max_tokens for card in cards),
        beta=cards[0].beta,
        r2=sum(known) / len(known) if known else None,
        teachers=job.teachers,
        state_layer=layer,
    )
    with tempfile.TemporaryDirectory() as folder:
        value.save(student.model, card, Path(folder))
        qhead.save(student.qhead, Path(folder))
        store.upload(Path(folder), layout.distilled_folder(job.name), metadata)


def _extended_card(store: Store, name: str) -> Card:
    return read_card(store, layout.distilled_folder(name))
