"""The base model's answers for the limit: independent of the sweep's, and sampled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mavis_dist.decode import SamplingParams
from mavis_dist.decode.request import stream_of
from mavis_dist.evaluate import base_answers, sweep
from mavis_dist.evaluate.sweep import Point
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt

PROMPTS = [Prompt(f"p{index}", f"question {index}?") for index in range(40)]


@pytest.mark.parametrize(("num", "sizes"), [(64, [4] * 10), (100, [2] * 20), (1000, [1] * 40), (4, [40])])
def test_every_prompt_is_asked_once_in_groups_of_some_hundred_answers(num: int, sizes: list[int]) -> None:
    groups = base_answers.requests(PROMPTS, SamplingParams(8, top_k=7, n=num))
    assert [len(group) for group in groups] == sizes
    asked = [pair for group in groups for pair in group]
    assert [prompt for prompt, _ in asked] == PROMPTS
    for prompt, request in asked:
        assert request.id == base_answers.request_id(prompt)
        assert not request.is_guided
        assert (request.params.max_tokens, request.params.top_k, request.params.n) == (8, 7, num)


def test_no_answer_shares_its_noise_with_another_or_with_the_sweep() -> None:
    params = SamplingParams(8, n=8)
    own = [request for group in base_answers.requests(PROMPTS, params) for _, request in group]
    others = [request for _, request in sweep.requests(Point("base"), PROMPTS, 6.0, 3.0, params)]
    streams = [stream_of(request, index) for request in own + others for index in range(params.n)]
    assert len(set(streams)) == len(streams) == 2 * 40 * 8


def test_rows_are_made_once_and_again_for_another_number_of_answers_or_after_damage(tmp_path: Path) -> None:
    store, made = Store(str(tmp_path), "run"), []

    def rows(num: int) -> list[list[str]]:
        def make() -> list[list[str]]:
            made.append(num)
            return [[f"{index} é" for index in range(num)]] * 2

        return base_answers.cached(store, "eval/x", num, make)

    assert rows(3) == rows(3) == [["0 é", "1 é", "2 é"]] * 2
    assert made == [3]
    assert len(rows(2)[0]) == 2
    assert made == [3, 2]
    (file,) = (path for path in Path(store.root, "eval/x").iterdir() if not path.name.startswith("_"))
    file.write_bytes(file.read_bytes()[:-1])
    assert rows(2) == [["0 é", "1 é"]] * 2
    assert made == [3, 2, 2]
