"""The student: tokens are drawn with its predictions, with one forward pass per token, independent of neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mavis_dist.decode import Engine, GuideRow, LocalGuide, Request, RequestError, SamplingParams, Scorer
from mavis_dist.decode.guide import ABSENT, Valuation
from mavis_dist.models import qhead
from mavis_dist.models.qhead import QHEAD_FILE, Student, deltas
from mavis_dist.models.value import ValueModelError
from tests.fakes import EOS, tiny_base, tiny_student, tiny_value

BASE = tiny_base(seed=0, eos_boost=1.0)
STUDENT = tiny_student(5, num_objectives=2)
MODELS = {"brief": (STUDENT.model, 0), "kind": (STUDENT.model, 1)}
STUDENTS = {"brief": (STUDENT, 0), "kind": (STUDENT, 1)}
PROMPT = (1, 5, 6, 7)


def guide() -> LocalGuide:
    return LocalGuide(MODELS, STUDENTS)


def request(scorer: Scorer = Scorer.QHEAD, **changes) -> Request:
    params = SamplingParams(max_tokens=12, seed=3)
    return replace(Request("1", PROMPT, {"brief": 0.3, "kind": 0.7}, 6.0, None, params, scorer=scorer), **changes)


@torch.no_grad()
def direct(tokens: tuple[int, ...], candidates: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """V(s) [M] and V(s) + delta(s, a) [N, M], from one forward pass over the whole sequence."""
    hidden = STUDENT.model.backbone(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1:]
    value = STUDENT.model.heads(hidden)
    embedding = STUDENT.model.backbone.get_input_embeddings()(torch.tensor(candidates))
    added = deltas(STUDENT.qhead, hidden.expand(len(candidates), -1), embedding)
    return value[0].numpy(), (value + added).numpy()


def test_scores_match_predictions_from_the_whole_sequence() -> None:
    """Opened with a shared prefix, extended, scored twice: always as with a forward pass over all tokens."""
    followed = guide()
    first = GuideRow(0, PROMPT, frozenset(MODELS), valuation=Valuation.PREDICTED)
    second = GuideRow(1, (*PROMPT, 9), frozenset(MODELS), 0, 4, Valuation.PREDICTED)
    np.testing.assert_allclose(followed.open([first])[0], direct(PROMPT, [3])[0], atol=1e-5)
    followed.open([second])
    values_NM = followed.score([1, 0], [2, 1], torch.tensor([20, 21, 22]))
    np.testing.assert_allclose(values_NM[:2], direct((*PROMPT, 9), [20, 21])[1], atol=1e-5)
    np.testing.assert_allclose(values_NM[2:], direct(PROMPT, [22])[1], atol=1e-5)
    values_BM = followed.extend([0], [[30, 31]])
    np.testing.assert_allclose(values_BM[0], direct((*PROMPT, 30, 31), [3])[0], atol=1e-5)
    np.testing.assert_allclose(
        followed.score([0], [1], torch.tensor([EOS])), direct((*PROMPT, 30, 31), [EOS])[1], atol=1e-5
    )
    followed.close([0, 1])
    assert all(not trunk.slots._slot_of for trunk in followed._trunks)


def test_a_checked_row_is_evaluated_and_predicted() -> None:
    """The values are the student's own, the predictions those of the token that was kept, from either call."""
    followed = guide()
    rows = [
        GuideRow(0, PROMPT, frozenset(MODELS), valuation=Valuation.CHECKED),
        GuideRow(1, (*PROMPT, 9), frozenset(MODELS), 0, 4, Valuation.CHECKED),
        GuideRow(2, (*PROMPT, 8), frozenset(MODELS)),
    ]
    followed.open(rows)
    texts = [list(row.tokens) for row in rows]
    for step in range(3):
        candidates = torch.tensor([[30 + step, 31, 32], [33, 34 + step, 35]])
        predictions_BKM = followed.predict([ABSENT, 1, 0], torch.cat([candidates[:1], candidates.flip(0)]))
        for deltas_KM, text, ids in zip(predictions_BKM[1:], texts[1::-1], candidates.tolist()[::-1], strict=True):
            value_M, after_KM = direct(tuple(text), ids)
            np.testing.assert_allclose(deltas_KM, after_KM - value_M, atol=1e-5)
        first_NM = followed.score([2, 1, 0], [1, 2, 1], torch.tensor([20, 33, 34 + step, 30 + step]))
        second_NM = followed.score([0, 2], [2, 1], torch.tensor([31, 32, 21]))
        expected = [
            direct((*texts[1], 33), [3]),
            direct((*texts[1], 34 + step), [3]),
            direct((*texts[0], 30 + step), [3]),
        ]
        np.testing.assert_allclose(first_NM[1:], [value_M for value_M, _ in expected], atol=1e-5)
        np.testing.assert_allclose(second_NM[1], direct((*texts[0], 32), [3])[0], atol=1e-5)
        followed.keep([0, 1, 2], torch.tensor([2, 1, 1]))
        for text, token in zip(texts, (32, 34 + step, 21), strict=True):
            text.append(token)
    np.testing.assert_allclose(followed.extend([0], [[40]])[0], direct((*texts[0], 40), [3])[0], atol=1e-5)
    followed.close([0, 1, 2])
    assert all(not trunk.slots._slot_of for trunk in followed._trunks)


def test_reported_values_are_the_state_value_plus_the_prediction() -> None:
    [[choice]] = Engine(BASE, guide()).generate([request()])
    so_far = list(PROMPT)
    for t, token in enumerate(choice.tokens):
        _, after_NM = direct(tuple(so_far), [token])
        assert choice.values["brief"][t] == pytest.approx(after_NM[0, 0], abs=1e-4)
        assert choice.values["kind"][t] == pytest.approx(after_NM[0, 1], abs=1e-4)
        so_far.append(token)
    assert set(choice.num_scored) == {40}


def test_a_token_costs_one_forward_pass_for_all_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt, then every token except the last; unused value models are not run."""
    followed, seen = guide(), []
    value_trunk, student_trunk, _ = followed._trunks
    monkeypatch.setattr(value_trunk.slots, "extend", None)
    monkeypatch.setattr(value_trunk.slots, "branch", None)
    extend = student_trunk.slots.extend
    monkeypatch.setattr(
        student_trunk.slots, "extend", lambda rows, tokens: [seen.append([*map(len, tokens)]), extend(rows, tokens)][1]
    )
    requests = [request(id=str(i), params=SamplingParams(max_tokens=6, top_k=20, seed=i)) for i in range(3)]
    choices = [c for [c] in Engine(tiny_base(0), followed).generate(requests)]
    assert [len(choice.tokens) for choice in choices] == [6, 6, 6]
    assert seen == [[4], [1, 1]] + 5 * [[1, 1, 1]]  # the prompt is shared, except its last token


def test_log_ratios_follow_the_predicted_deltas() -> None:
    """log pi(a) - log p(a) of every token, with a cap that does not apply to end-of-answer tokens."""
    cap, beta = 0.5, 6.0
    asked = request(tilt_cap=cap, beta=beta)
    [[choice]] = Engine(BASE, guide()).generate([asked])
    so_far = list(PROMPT)
    for t, token in enumerate(choice.tokens):
        with torch.no_grad():
            logits = BASE.model(input_ids=torch.tensor([so_far])).logits[0, -1]
        if t == 0:
            logits[EOS] = -torch.inf
        top = logits.topk(40)
        value_M, after_NM = direct(tuple(so_far), top.indices.tolist())
        delta = torch.from_numpy(beta * ((after_NM - value_M) @ np.array([0.3, 0.7])))
        delta = torch.where(top.indices == EOS, delta, delta.clamp(max=cap))
        logratio = delta - torch.logsumexp(torch.log_softmax(top.values, -1) + delta, -1)
        assert choice.logratios[t] == pytest.approx(float(logratio[top.indices == token]), abs=1e-4)
        so_far.append(token)


@pytest.mark.parametrize("scorer", [Scorer.QHEAD, Scorer.PREDICTED])
@pytest.mark.parametrize("guide_every", [1, 3])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resubmitted_answer_continues_identically(cut: int, guide_every: int, scorer: Scorer) -> None:
    """Also with a cap, under which the distribution depends on V(s): it is the heads' in both cases."""
    asked = request(scorer, tilt_cap=0.4, guide_every=guide_every)
    [[whole]] = Engine(BASE, guide()).generate([asked])
    assert len(whole.tokens) > cut
    [[rest]] = Engine(BASE, guide()).generate([replace(asked, answer=tuple(whole.tokens[:cut]))])
    assert rest.tokens == whole.tokens[cut:]
    np.testing.assert_allclose(rest.values["kind"], whole.values["kind"][cut:], atol=1e-4)


@pytest.mark.parametrize("scorer", [Scorer.QHEAD, Scorer.PREDICTED])
def test_a_student_that_is_not_finite_fails_only_its_own_rows(scorer: Scorer) -> None:
    broken = tiny_student(5, num_objectives=2)
    broken.qhead.queries[0].weight.fill_(float("nan"))
    models = {"brief": (STUDENT.model, 0), "kind": (STUDENT.model, 1)}
    engine = Engine(BASE, LocalGuide(models, {"brief": (broken, 0), "kind": (STUDENT, 1)}))
    bad, good = request(scorer, weights={"brief": 1.0}), request(scorer, id="2", weights={"kind": 1.0})
    [[failed], [fine]] = engine.generate([bad, good])
    assert "value model" in str(failed.error)
    [[alone]] = Engine(BASE, guide()).generate([good])
    assert (fine.error, fine.tokens) == (None, alone.tokens)


@pytest.mark.parametrize(
    ("students", "weights", "named"),
    [({}, {"kind": 1.0}, "kind"), ({"brief": (STUDENT, 0)}, {"kind": 1.0, "brief": 1.0}, "kind"), ({}, {}, "any")],
)
@pytest.mark.parametrize("scorer", [Scorer.QHEAD, Scorer.PREDICTED])
def test_without_a_student_the_request_is_rejected(students, weights, named, scorer) -> None:
    engine = Engine(BASE, LocalGuide(MODELS, students))
    with pytest.raises(RequestError, match=f"scorer: is '{scorer.value}'.*no student for {named}.*lazy") as refused:
        engine.submit(request(scorer, weights=weights))
    assert refused.value.field == "scorer"
    with pytest.raises(RequestError, match="no student"):
        Engine(BASE).submit(request(scorer, weights={}))


def test_adding_an_objective_does_not_change_the_others(tmp_path: Path) -> None:
    """Weights and outputs, bit for bit, for numbers of rows that use different kernels."""
    grown = Student(tiny_value(5, 2), qhead.QHead(32, 2, 4))
    grown.load_state_dict(STUDENT.state_dict())
    hidden = {n: torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 7, 64, 257)}
    before = {n: STUDENT.split(STUDENT.read(h)) for n, h in hidden.items()}
    for count in (3, 4, 5):
        grown.add_objective()
        torch.nn.init.normal_(grown.model.heads.weight.data[-1])
        torch.nn.init.normal_(grown.qhead.queries[-1].weight.data)
        assert grown.num_objectives == count
        assert torch.equal(grown.model.heads.weight[:2], STUDENT.model.heads.weight)
        for n, h in hidden.items():
            values, queries = grown.split(grown.read(h))
            assert torch.equal(values[:, :2], before[n][0])
            assert torch.equal(queries[:, :2], before[n][1])


def test_a_student_is_saved_and_loaded_strictly(tmp_path: Path) -> None:
    qhead.save(STUDENT.qhead, tmp_path)
    loaded = qhead.load(tmp_path, STUDENT.model)
    for name, tensor in STUDENT.qhead.state_dict().items():
        assert torch.equal(loaded.qhead.state_dict()[name], tensor)
    with pytest.raises(ValueModelError, match="distil it again"):
        qhead.load(tmp_path, tiny_value(1, num_objectives=3))
    weights = load_file(tmp_path / QHEAD_FILE)
    weights.pop("queries.1.bias")
    save_file(weights, tmp_path / QHEAD_FILE)
    with pytest.raises(ValueModelError, match=r"queries\.1\.bias"):
        qhead.load(tmp_path, STUDENT.model)
    (tmp_path / QHEAD_FILE).unlink()
    with pytest.raises(ValueModelError, match=r"qhead\.safetensors"):
        qhead.load(tmp_path, STUDENT.model)
