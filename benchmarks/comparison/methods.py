"""The trained alternatives as methods of a comparison (docs/evaluation.md): soups, mixtures, a policy per weights.

All of them answer beside the base model, on its candidates: their divergences are exact.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

from benchmarks.comparison.decode import MixtureDecoder
from benchmarks.comparison.load import load_merged, marker_of
from benchmarks.comparison.merge import ADAPTER_FILES
from benchmarks.comparison.policies import DPO, FOLDER, KLS, PAIR_WEIGHTS, RL, policy
from mavis_dist.compare.cells import weight_vectors
from mavis_dist.compare.guides import TREES, tree_tokens
from mavis_dist.compare.method import Answer, Method, Training
from mavis_dist.compare.workspace import Generated, Workspace
from mavis_dist.evaluate.collect import stage_seconds
from mavis_dist.models.load import BaseModel, fetch, fingerprint_model
from mavis_dist.types import BASE_POLICY, Prompt, UserError


class Policies(Method):
    """A method with policies that `benchmarks.comparison.train` has stored in the run.

    Settings: `kl` and `tag`, which end the policies' names. The strength is how far to go from the base model (0) to
    the policies (1) and beyond.
    """

    strengths: tuple[float, ...] = (
        0.5,
        1.0,
        1.5,
        2.0,
        3.0,
    )  # mixed policies are nearer to the base model than each of them
    defaults = MappingProxyType({"kl": KLS[RL], "tag": ""})
    kind: ClassVar[str] = RL

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Names of the policies that answer under some weights -> their shares: by default one per objective."""
        return {self.name({objective: 1.0}): share for objective, share in weights.items()}

    def name(self, weights: Mapping[str, float]) -> str:
        """Of the policy that was trained for some weights."""
        return policy(self.kind, weights, self.settings["kl"], self.settings["tag"]).name

    @cached_property
    def markers(self) -> dict[str, dict[str, Any]]:
        """What is stored about all its policies, by name; raises UserError."""
        store, config = self.workspace.store, self.workspace.config
        vectors = map(dict, weight_vectors(list(config.objectives), config.compare.weights))
        names = dict.fromkeys(name for weights in vectors if self.covers(weights) for name in self.shares(weights))
        if missing := [name for name in names if store.metadata(f"{FOLDER}/{name}") is None]:
            raise UserError(f"{store.root} lacks the policies {', '.join(missing)}: run {self.command(missing)}")
        base = fingerprint_model(fetch(config.base.model))
        return {name: marker_of(store, name, base) for name in names}

    def command(self, names: Sequence[str]) -> str:
        """Trains policies."""
        kl, tag = self.settings["kl"], self.settings["tag"]
        command = f"python -m benchmarks.comparison.train --config FILE --policies {','.join(names)}"
        return f"{command} --{self.kind}-kls {kl:g}{f' --tag={tag}' if tag else ''}"

    def check(self) -> None:
        if not (isinstance(self.settings["kl"], (int, float)) and self.settings["kl"] > 0):
            raise UserError(f"kl is {self.settings['kl']!r}: use the number in the policies' names")
        if not isinstance(self.settings["tag"], str):
            raise UserError(f"tag is {self.settings['tag']!r}: use the end of the policies' names, in quotes")
        _ = self.markers

    def inputs(self) -> Mapping[str, Any]:
        return {"policies": {name: self._fingerprint(name) for name in self.markers}}

    def training(self) -> Training:
        of_policies = policies_training(self.markers.values())
        if self.kind != DPO:
            return of_policies
        store = self.workspace.store  # whose trees its pairs are from
        seconds = of_policies.seconds + math.fsum(stage_seconds(store, TREES).values())
        return replace(of_policies, seconds=seconds, tokens=of_policies.tokens + tree_tokens(store, BASE_POLICY))

    def decode(
        self,
        policies: Sequence[BaseModel],
        shares: Sequence[float],
        strength: float,
        prompts: Sequence[Prompt],
        seed: int,
    ) -> list[Answer]:
        """Answers of a mixture, timed with the base model beside it, which measures the divergence."""
        decoder = MixtureDecoder(self.workspace.base, policies, self.workspace.config.rollout.rows)
        started = time.perf_counter()
        choices = decoder.answer(self.workspace.requests(prompts, seed), shares, strength)
        found = Generated([[choice] for choice in choices], time.perf_counter() - started)
        return [
            Answer(one.text, len(one.tokens), one.divergence, len(one.tokens), 0, found.seconds_of([one]))
            for one in choices
        ]

    def _fingerprint(self, name: str) -> str:
        store = self.workspace.store
        return hashlib.sha256(
            b"".join(store.read_bytes(f"{FOLDER}/{name}/{file}") for file in ADAPTER_FILES)
        ).hexdigest()


def policies_training(markers: Collection[Mapping[str, Any]]) -> Training:
    """What it took to train these policies."""
    return Training(
        math.fsum(marker["seconds"] for marker in markers),
        sum(marker["tokens"] for marker in markers),
        frozenset(marker["machine"] for marker in markers if "machine" in marker),
    )


class Soups(Policies):
    """Rewarded Soups (arXiv 2306.04488): the policies' differences from the base model, summed by weight and scaled."""

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        merged = load_merged(self.workspace.config, self.workspace.store, self.shares(weights), strength)
        return self.decode([merged], [1.0], 1.0, prompts, seed)


class Mod(Policies):
    """MOD (arXiv 2406.18853): the policies' log-probabilities mixed by weight; strengths as in DeRa (2402.02992)."""

    def __init__(self, workspace: Workspace, settings: Mapping[str, Any]):
        super().__init__(workspace, settings)
        self._models: dict[str, BaseModel] = {}  # those of the last answers

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        config, store, shares = self.workspace.config, self.workspace.store, self.shares(weights)
        self._models = {name: self._models.get(name) or load_merged(config, store, {name: 1.0}) for name in shares}
        return self.decode(list(self._models.values()), list(shares.values()), strength, prompts, seed)


class Morlhf(Mod):
    """MORLHF: a policy trained for exactly the weights, which are those of single objectives and of pairs.

    Settings, besides those of Policies: `pair_weights`, of a pair's first objective.
    """

    defaults = MappingProxyType({**Policies.defaults, "pair_weights": PAIR_WEIGHTS})

    def covers(self, weights: Mapping[str, float]) -> bool:
        first = next(iter(weights.values()))
        is_trained = any(math.isclose(first, share) for share in self.settings["pair_weights"])
        return len(weights) == 1 or (len(weights) == 2 and is_trained)

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        return {self.name(weights): 1.0}

    def training_for(self, weights: Mapping[str, float]) -> Training:
        return policies_training([self.markers[self.name(weights)]])

    def command(self, names: Sequence[str]) -> str:
        return f"{super().command(names)} --weights {','.join(f'{share:g}' for share in self.settings['pair_weights'])}"

    def check(self) -> None:
        given = self.settings["pair_weights"]
        is_list = isinstance(given, (list, tuple))
        if not is_list or not all(isinstance(share, (int, float)) and 0 < share < 1 for share in given):
            raise UserError(f"pair_weights is {given!r}: use a list of numbers between 0 and 1")
        super().check()


class DpoSoups(Soups):
    """Soups of policies that DPO has trained on pairs from the trees."""

    strengths = (0.25, 0.5, 1.0, 1.5)
    defaults = MappingProxyType({**Policies.defaults, "kl": KLS[DPO]})
    kind = DPO


class DpoMod(Mod):
    """Mixtures of these."""

    strengths, defaults, kind = DpoSoups.strengths, DpoSoups.defaults, DPO
