"""Methods that steer by preferences, objectives given as sentences; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mavis_dist.compare.method import Answer, Method
from mavis_dist.compare.workspace import Workspace
from mavis_dist.decode import PRESETS, Preference, PreferenceParams, Request, chat_prompts
from mavis_dist.decode.validate import MAX_STRENGTH
from mavis_dist.types import Prompt, UserError

EMPHASIS = "This matters more than anything else."
# The policy of a prompt as a single preference of full strength: the engine then measures its divergence.
AS_PROMPTED = PreferenceParams(adapt=False, c=1.0, top_p=1.0)


def wishes(workspace: Workspace, weights: Mapping[str, float]) -> str:
    """The preferences of the objectives, a line each, the most important first."""
    order = sorted(weights, key=lambda name: -weights[name])
    lines = [workspace.preference(name) for name in order]
    if len(order) == 1:
        return lines[0]
    shares = (f"importance: {100 * weights[name]:.0f} %" for name in order)
    return "\n".join(f"{line} ({share})" for line, share in zip(lines, shares, strict=True))


class ByPreference(Method):
    """A method that steers by the preferences of the objectives."""

    def check(self) -> None:
        for name in self.workspace.config.objectives:
            self.workspace.preference(name)

    def inputs(self) -> Mapping[str, Any]:
        return {"preferences": {name: self.workspace.preference(name) for name in self.workspace.config.objectives}}

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        found = self.workspace.generate(requests, {})
        return [
            Answer(one.text, len(one.tokens), one.divergence, len(one.tokens), 0, found.seconds_of([one]))
            for (one,) in found.choices
        ]


class OnePrompt(ByPreference):
    """One prompt with all preferences and their importance; the strength is how insistent it is.

    1: after the system text. 2: with emphasis. 3: after the question as well. 4: both. The divergence is exact. A
    second row, of the plain prompt, measures it: without, these answers would take about half the time.
    """

    strengths = (1.0, 2.0, 3.0, 4.0)

    def check(self) -> None:
        super().check()
        if not set(self.strengths) <= set(OnePrompt.strengths):
            raise UserError(f"strengths has {[*self.strengths]}: use some of 1, 2, 3, 4")

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        text = wishes(self.workspace, weights)
        if strength in (2.0, 4.0):
            text = f"{text}\n{EMPHASIS}"
        system = f"{self.workspace.config.base.system}\n{text}"
        requests = []
        for prompt, request in zip(prompts, self.workspace.requests(prompts, seed), strict=True):
            *earlier, question = prompt.messages
            if strength >= 3:
                question = {**question, "content": f"{question['content']}\n\n{text}"}
            preference = Preference(text, self.workspace.base.chat([*earlier, question], system))
            requests.append(replace(request, preferences=(preference,), preference_params=AS_PROMPTED))
        return self.generate(requests)


class Mato(ByPreference):
    """MATO and its relatives (docs/preferences.md); the strength is c. The divergence is exact.

    Settings: `preset`, where all parameters but c are from.
    """

    strengths = (1.0, 2.0, 3.0, 4.0, 6.0)
    defaults = MappingProxyType({"preset": "mato"})

    def check(self) -> None:
        super().check()
        if self.settings["preset"] not in PRESETS:
            raise UserError(f"preset is {self.settings['preset']!r}: use {', '.join(PRESETS)}")
        if self.strengths[-1] > MAX_STRENGTH:
            raise UserError(f"strengths has {self.strengths[-1]:g}: use numbers up to {MAX_STRENGTH:g}")

    def answer(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], strength: float, seed: int
    ) -> list[Answer]:
        weighted = [(self.workspace.preference(name), weight) for name, weight in weights.items()]
        params = replace(PRESETS[self.settings["preset"]], c=strength)
        tokenizer, system = self.workspace.base.tokenizer, self.workspace.config.base.system
        requests = []
        for prompt, request in zip(prompts, self.workspace.requests(prompts, seed), strict=True):
            _, preferences = chat_prompts(tokenizer, prompt.messages, weighted, system)
            requests.append(replace(request, preferences=preferences, preference_params=params))
        return self.generate(requests)
