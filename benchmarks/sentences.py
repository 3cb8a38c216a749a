"""What steering by sentences costs beside its rows: requests with sentences against as many plain requests.

Both encode the very same prompts, and write as many tokens in as many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.turns import Speeds, take_turns
from benchmarks.workload import Workload
from mavis_dist.decode import Engine, Request, SamplingParams, chat_preferences
from mavis_dist.prompts import load_prompts

SENTENCES = (
    "Answer in as few words as possible.",
    "Be warm, positive and encouraging.",
    "Stay strictly on the user's question.",
    "Write for a child of ten.",
)
NUM_REQUESTS = 8


def measure(workload: Workload, repetitions: int, tokens: int) -> Speeds:
    """Tokens per second of all rows together."""
    worded = requests(workload, tokens)
    prompts = [prompt for request in worded for prompt in (request.prompt, *(p.prompt for p in request.preferences))]
    plain = [Request(str(row), prompt, params=SamplingParams(tokens, seed=row)) for row, prompt in enumerate(prompts)]
    engine = Engine(workload.endless, max_rows=len(prompts))

    def ways(asked: Sequence[Request]) -> Callable[[int], float]:
        def decode(repetition: int) -> float:
            engine.generate(asked)
            return float(len(prompts) * tokens)

        return decode

    variants = {"worded": ways(worded), "plain": ways(plain)}
    take_turns(variants, 1)  # what is done for the first time takes longer
    return take_turns(variants, repetitions)


def requests(workload: Workload, tokens: int) -> list[Request]:
    """Every request with weights of its own."""
    base, system = workload.base, workload.config.base.system
    _, prompts = load_prompts(workload.config.prompts, workload.config.seed)
    return [
        Request(
            str(i),
            base.chat(prompt.text, system),
            preferences=chat_preferences(
                base.tokenizer, prompt.text, [(text, 1.0 + (i + k) % 4) for k, text in enumerate(SENTENCES)], system
            ),
            params=SamplingParams(tokens, seed=i),
        )
        for i, prompt in enumerate(prompts[:NUM_REQUESTS])
    ]
