"""A language model as a judge of answers, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mavis_dist.rewards.protocol import RewardError
from mavis_dist.sections import Endpoint
from mavis_dist.types import one_line

RATINGS = tuple("123456789")
PARALLEL = 8  # questions at a time
RETRIES = 5  # of a question after a lost connection, 429 or 5xx, with growing pauses
TIMEOUT_S = 120.0
CONNECT_S = 10.0
TOP = 20  # most likely tokens that an endpoint is asked for
QUESTION = """Question:
{prompt}

Answer:
{answer}

Criterion: {criterion}
How well does the answer meet the criterion? Reply with one digit, from 1 (not at all) to 9 (fully)."""


@dataclass(frozen=True)
class Reply:
    """A judge's reply, with the distributions that its tokens were drawn from if the endpoint gives them."""

    text: str
    tokens: Sequence[str] = ()
    distributions: Sequence[Mapping[str, float]] = ()  # of every token: likely texts -> probability

    def shares(self, options: Collection[str]) -> dict[str, float]:
        """The probability of every option, with the sum 1; without distributions the option replied; empty if none.

        Looks at the first token that is an option, else at the first token at all.
        """
        options = set(options)
        where = next((n for n, token in enumerate(self.tokens) if token.strip() in options), 0)
        if where < len(self.distributions):
            found: dict[str, float] = {}
            for text, probability in self.distributions[where].items():
                if text.strip() in options:
                    found[text.strip()] = found.get(text.strip(), 0.0) + probability
            if total := sum(found.values()):
                return {option: probability / total for option, probability in found.items()}
        replied = next((character for character in self.text if character in options), None)
        return {} if replied is None else {replied: 1.0}


class LanguageModel:
    """A model behind an endpoint; asks several questions at a time."""

    def __init__(self, endpoint: Endpoint, retries: int = RETRIES):
        """Raises RewardError if the package openai is missing, or the key cannot be sent."""
        try:
            from openai import OpenAI, Timeout
        except ImportError:
            raise RewardError("a judge needs the package openai: pip install 'mavis-dist[judge]'") from None
        self._endpoint, self._gives_logprobs = endpoint, True
        key = os.environ.get(endpoint.key_env) or "none"  # many servers ask for none
        if not (key.isascii() and key.isprintable()):
            raise RewardError(
                f"environment variable {endpoint.key_env}, the key of judge {endpoint.model!r}, holds characters that "
                "no key has: copy it again"
            )
        timeout = Timeout(TIMEOUT_S, connect=CONNECT_S)
        self._client = OpenAI(base_url=endpoint.url, api_key=key, max_retries=retries, timeout=timeout)

    def replies(self, questions: Sequence[str]) -> Iterator[Reply]:
        """A reply to every question, in order; raises RewardError with the endpoint's reason."""
        with ThreadPoolExecutor(PARALLEL, "judge") as threads:
            waiting = [threads.submit(self._reply, question) for question in questions]
            try:
                for future in waiting:
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()

    def _reply(self, question: str) -> Reply:
        from openai import APIStatusError, BadRequestError, OpenAIError

        asked_logprobs = self._gives_logprobs
        try:
            return self._ask(question, asked_logprobs)
        except BadRequestError as error:
            if not (asked_logprobs and "logprobs" in str(error)):
                raise self._failure(error) from None
        except APIStatusError as error:
            raise self._failure(error) from None
        except OpenAIError as error:
            raise self._failure(error.__cause__ or error) from None
        self._gives_logprobs = False  # such as those of models that reason first
        return self._reply(question)

    def _ask(self, question: str, with_logprobs: bool) -> Reply:
        # At temperature 1 the distribution is the model's own with every server; a seed makes a drawn reply repeatable.
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP, "max_completion_tokens": 4}
        completion = self._client.chat.completions.create(
            model=self._endpoint.model,
            messages=[{"role": "user", "content": question}],
            temperature=1.0,
            seed=0,
            **(options if with_logprobs else {}),
        )
        choice = completion.choices[0]
        given = choice.logprobs.content if choice.logprobs is not None else None
        return Reply(
            choice.message.content or "",
            [token.token for token in given or ()],
            [_probabilities(token.top_logprobs) for token in given or ()],
        )

    def _failure(self, error: BaseException) -> RewardError:
        where = f"judge {self._endpoint.model!r} at {self._endpoint.url}"
        return RewardError(
            f"{where} does not answer ({one_line(error)}): check url, model and ${self._endpoint.key_env}"
        )


def _probabilities(tokens: Sequence[Any]) -> dict[str, float]:
    return {token.token: math.exp(token.logprob) for token in tokens}


class Judge:
    """A rating of how well answers meet a criterion, from 1 to 9.

    The rating is the mean of the model's distribution over digits (G-Eval, Liu et al., arXiv 2303.16634), or the digit
    that it replied with where the endpoint gives no log-probabilities.
    """

    def __init__(self, endpoint: Endpoint, criterion: str, retries: int = RETRIES):
        self._model, self._endpoint, self._criterion = LanguageModel(endpoint, retries), endpoint, criterion

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        pairs = list(zip(prompts, answers, strict=True))
        different = list(dict.fromkeys(pairs))
        questions = [QUESTION.format(prompt=p, answer=a, criterion=self._criterion) for p, a in different]
        replies = self._model.replies(questions)
        ratings = {pair: self._rating(reply) for pair, reply in zip(different, replies, strict=True)}
        return [ratings[pair] for pair in pairs]

    def _rating(self, reply: Reply) -> float:
        shares = reply.shares(RATINGS)
        if not shares:
            raise RewardError(
                f"judge {self._endpoint.model!r} at {self._endpoint.url} replied {one_line(reply.text, 60)!r} where a "
                "digit from 1 to 9 was asked for: use a model that follows instructions"
            )
        return sum(int(digit) * share for digit, share in shares.items())
