"""Labels for distillation: candidates inside packed trees, and the fit of heads on a frozen trunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mavis_dist.core.tree import Finish, Tree, TreeBuilder
from mavis_dist.models.qhead import deltas
from mavis_dist.train.distill.fit import DistillLoss, fit_heads, trunk_statistics
from mavis_dist.train.distill.labels import (
    DistillLabels,
    Sampling,
    collate,
    label_tree,
    open_states,
    propose,
    values_of,
    with_candidates,
)
from mavis_dist.train.worker_group import WorkerGroup
from tests.fakes import EOS, VOCAB, tiny_base, tiny_student, tiny_value

BASE = tiny_base(seed=0, eos_boost=1.0)
SAMPLING = Sampling(states=9, candidates=6, top_k=20, top_p=1.0, min_p=0.0)


def some_tree(seed: int = 0) -> Tree:
    """Two segments at the prompt, one open and one finished with a cut; leaves of both kinds."""
    tokens = lambda n: np.random.default_rng([seed, n]).integers(3, VOCAB, n).tolist()  # noqa: E731
    builder = TreeBuilder(f"p{seed}", "base", seed, [1, *tokens(6)])
    opened = builder.add(-1, 0, tokens(5), [0.0] * 5, Finish.OPEN)
    ended = builder.add(-1, 0, [*tokens(7), EOS], [0.0] * 8, Finish.STOP)
    builder.add(opened, 5, tokens(3), [0.0] * 3, Finish.LENGTH)
    builder.add(opened, 5, [*tokens(2), EOS], [0.0] * 3, Finish.STOP)
    builder.add(ended, 4, tokens(4), [0.0] * 4, Finish.LENGTH)
    return builder.build()


def path_to(tree: Tree, state: int) -> list[int]:
    """Prompt and answer up to a labelled token."""
    if state == 0:
        return tree.prompt_tokens.tolist()
    node = int(np.searchsorted(tree.node_start, state - 1, side="right")) - 1
    after = tree.length(node) - (state - int(tree.node_start[node]))  # tokens of the segment behind it
    answer = tree.answer(node)
    return [*tree.prompt_tokens.tolist(), *answer[: len(answer) - after].tolist()]


def test_packed_candidates_are_separate_forward_passes() -> None:
    tree, model = some_tree(), tiny_value(1, num_objectives=2, layers=2)
    state_C, token_C = propose(BASE, tree, SAMPLING, np.random.default_rng(0))
    values_XM = values_of(model, with_candidates(tree, state_C, token_C))
    np.testing.assert_allclose(values_XM[: len(tree.tokens) + 1], values_of(model, tree), atol=1e-5)
    for c, (state, token) in enumerate(zip(state_C, token_C, strict=True)):
        path = torch.tensor([[*path_to(tree, state), int(token)]])
        np.testing.assert_allclose(values_XM[len(tree.tokens) + 1 + c], model(input_ids=path)[0, -1], atol=1e-5)


def test_candidates_follow_open_states_and_belong_to_the_truncated_distribution() -> None:
    tree = some_tree()
    assert set(range(len(tree.tokens) + 1)) - set(open_states(tree)) == {13, 16, 19, 23}  # the last tokens of answers
    state_C, token_C = propose(BASE, tree, SAMPLING, np.random.default_rng(0))
    states = sorted(set(state_C.tolist()))
    assert len(states) == SAMPLING.states
    assert states[0] == 0
    assert set(states) <= set(open_states(tree))
    for state in states:
        tokens = token_C[state_C == state].tolist()
        logits = BASE.model(input_ids=torch.tensor([path_to(tree, state)])).logits[0, -1]
        if state == 0:
            logits[EOS] = -torch.inf
        kept = logits.topk(SAMPLING.top_k).indices.tolist()
        assert len(set(tokens)) == SAMPLING.candidates
        assert set(tokens) <= set(kept)
        assert (EOS in tokens) == (EOS in kept)


def test_labels_are_the_same_for_the_same_seed_only() -> None:
    teachers = [(tiny_value(1), 0)]
    first, again, other = (label_tree(BASE, teachers, some_tree(), SAMPLING, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.tree.tokens, again.tree.tokens)
    np.testing.assert_array_equal(first.values_XM, again.values_XM)
    assert first.tree.tokens.tolist() != other.tree.tokens.tolist()


def make_labels(num_trees: int = 6) -> list[DistillLabels]:
    teachers = [(tiny_value(1), 0), (tiny_value(2, num_objectives=2), 1)]
    return [label_tree(BASE, teachers, some_tree(seed), SAMPLING, 0) for seed in range(num_trees)]


def test_the_errors_of_a_batch_are_those_of_its_trees_one_by_one() -> None:
    student, labels = tiny_student(7, num_objectives=2), make_labels(2)
    few = Sampling(states=3, candidates=2, top_k=20, top_p=1.0, min_p=0.0)
    labels[1] = label_tree(BASE, [(tiny_value(1), 0), (tiny_value(3), 0)], some_tree(5), few, 0)
    values = differences = predictions = 0.0
    for label in labels:
        pred_XM = values_of(student.model, label.tree)
        values += float(((pred_XM - label.values_XM) ** 2).sum())
        differences += float(((pred_XM[label.candidate_C] - pred_XM[label.state_C] - label.deltas_CM) ** 2).sum())
        for state, token, wanted in zip(label.state_C, label.token_C, label.deltas_CM, strict=True):
            inputs = torch.tensor([path_to(label.tree, state)])
            hidden = student.model.backbone(input_ids=inputs).last_hidden_state[:, -1]
            embedding = student.model.backbone.get_input_embeddings()(torch.tensor([token]))
            predictions += float(((deltas(student.qhead, hidden, embedding)[0].numpy() - wanted) ** 2).sum())
    errors = DistillLoss(student)(collate(labels))
    assert [float(x) for x in errors] == pytest.approx([values, differences, predictions], rel=1e-4)


def test_heads_fit_a_teacher_on_the_same_trunk_and_old_heads_do_not_change() -> None:
    """A teacher on the same trunk is linear in the hidden states, so the fit finds it, biases included."""
    student = tiny_value(4, num_objectives=2)
    teacher = tiny_value(4, num_objectives=2)
    torch.nn.init.normal_(teacher.heads.weight)
    torch.nn.init.normal_(teacher.heads.bias)
    labels = [label_tree(BASE, [(teacher, 0), (teacher, 1)], some_tree(seed), SAMPLING, 0) for seed in range(8)]
    old, told = student.heads.weight[0].clone(), []
    group = WorkerGroup(progress=lambda *step: told.append(step))
    fit_heads(student, trunk_statistics(student, labels, group), first=1)
    assert told == [("states", done, 8, "") for done in range(1, 9)]
    assert torch.equal(student.heads.weight[0], old)
    wanted = np.concatenate([label.values_XM[:, 1] for label in labels])
    pred = np.concatenate([values_of(student, label.tree)[:, 1] for label in labels])
    assert ((pred - wanted) ** 2).mean() < 1e-3 * wanted.var()
