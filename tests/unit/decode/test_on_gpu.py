"""The engine on a GPU: the answers of a processor, from recorded graphs, and one wait per step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mavis_dist.decode import Engine, LocalGuide, scorer
from tests.fakes import VOCAB
from tests.unit.decode.test_device_step import BASE, ENDLESS, KINDS, MODELS, STUDENTS, only

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = "cuda"


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(base=BASE, max_rows: int = 5) -> Engine:
    models = {name: deepcopy(model).to(GPU) for name, model in MODELS.items()}
    student = deepcopy(STUDENTS["kind"][0]).to(GPU)
    students = {name: (student, head) for name, (_, head) in STUDENTS.items()}
    moved = replace(base, model=deepcopy(base.model).to(GPU))
    return Engine(moved, LocalGuide(models, students), max_rows=max_rows)


@pytest.mark.parametrize("kind", [*KINDS, "every other", "qhead"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_answers_are_those_of_a_processor(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "FIRST_CHUNK", chunk)
    monkeypatch.setattr(scorer, "SLACK", float("inf"))
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", chunk)
    exact = [choice for [choice] in Engine(BASE, LocalGuide(MODELS, STUDENTS), max_rows=5).generate(only(kind, 11))]
    engine = on_gpu()
    for _ in range(2):  # the second time over graphs recorded in the first
        found = [choice for [choice] in engine.generate(only(kind, 11))]
        for expected, choice in zip(exact, found, strict=True):
            assert choice.tokens == expected.tokens
            np.testing.assert_allclose(choice.logratios, expected.logratios, atol=2e-3)
            np.testing.assert_allclose(choice.divergences, expected.divergences, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any step in which no row starts or ends."""
    monkeypatch.setattr(scorer, "FIRST_CHUNK_UNREAD", VOCAB)
    engine = on_gpu(ENDLESS, max_rows=16)
    for request in only(kind, 5):
        engine.submit(replace(request, params=replace(request.params, top_k=min(request.params.top_k, 20))))
    for _ in range(4):
        engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(6):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                assert len(engine.step()) == 5
            waits = [w for w in seen if "synchroniz" in str(w.message)]
            assert len(waits) <= 1, [str(w.message) for w in waits]
    finally:
        torch.cuda.set_sync_debug_mode("default")
