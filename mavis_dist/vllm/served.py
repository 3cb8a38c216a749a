"""The value models that a vLLM server steers with: those that MAVIS_VALUES names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from mavis_dist.decode import LocalGuide
from mavis_dist.decode.load_guide import fetch_published, load_guide
from mavis_dist.environment import variable
from mavis_dist.llm import open_run
from mavis_dist.models.directory import fingerprint_model, fingerprint_tokenizer, read_config, read_tokenizer
from mavis_dist.models.end_tokens import end_ids
from mavis_dist.models.fetch import fetch
from mavis_dist.models.value import Card, ValueModelError, load_card
from mavis_dist.sections import Steer
from mavis_dist.store.files import StoreError
from mavis_dist.types import UserError

VARIABLE = "MAVIS_VALUES"
REMEDY = "set it to the folder or URI of a finished run, or to name=folder of value models, separated by commas"


@dataclass(frozen=True)
class Served:
    """What MAVIS_VALUES names: read from the cards alone, without weights."""

    folders: dict[str, Path]  # objective -> folder of its value model
    cards: dict[str, Card]
    steer: Steer  # the strength of requests that give none

    @property
    def students(self) -> frozenset[str]:
        """The objectives that a student predicts."""
        return frozenset(name for name, card in self.cards.items() if card.teachers)

    @cached_property
    def failure_id(self) -> int | None:
        """The token that ends an answer whose value models failed: one that begins or pads texts, but ends none. None
        if the tokenizer has no such token.
        """
        config = read_config(next(iter(self.folders.values())))
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ids = (config.bos_token_id, config.pad_token_id)
        return next((id_ for id_ in ids if isinstance(id_, int) and id_ not in ends), None)

    def guide_for(self, model: str, tokenizer: str, dtype: torch.dtype, device: torch.device) -> LocalGuide:
        """The value models, ready to guide this base model.

        Raises:
            UserError: they were trained for another base model or tokenizer, read its states, or are damaged.
        """
        base_fingerprint = fingerprint_model(fetch(model))
        tokenizer_fingerprint = fingerprint_tokenizer(fetch(tokenizer))
        for name, card in self.cards.items():
            if card.state_layer is not None:
                raise ValueModelError(
                    f"the value model of {name!r} reads its base model's states, which vLLM does not give: train one "
                    "of kind model or shared, or serve it with this project's own service"
                )
            card.check(base_fingerprint, tokenizer_fingerprint)
        return load_guide(self.folders, dtype, str(device))


@dataclass(frozen=True)
class Ends:
    """The tokens that end an answer."""

    ids: tuple[int, ...]  # all of them
    default_id: int  # the one that vLLM always takes for the end


def ends_of(model: str, tokenizer: str, vocabulary: int) -> Ends:
    """Raises ModelError."""
    read = read_tokenizer(fetch(tokenizer))
    ids = end_ids(fetch(model), read, vocabulary)
    return Ends(ids, read.eos_token_id if read.eos_token_id in ids else ids[0])


def served() -> Served:
    """Raises UserError if MAVIS_VALUES is not set, or names what cannot be used."""
    named = variable(VARIABLE)
    if named is None:
        raise UserError(f"environment variable {VARIABLE} is not set: {REMEDY}")
    return _served(named)


@lru_cache
def _served(named: str) -> Served:
    folders, steer = _named_folders(named) if "=" in named else _published(named)
    cards = {name: load_card(folder) for name, folder in folders.items()}
    for name, card in cards.items():
        if name not in card.objectives:
            raise UserError(
                f"environment variable {VARIABLE}: {folders[name]} holds the objectives {', '.join(card.objectives)}, "
                f"not {name!r}"
            )
    return Served(folders, cards, steer)


def _named_folders(named: str) -> tuple[dict[str, Path], Steer]:
    folders: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in named.split(","))):
        name, _, folder = (piece.strip() for piece in part.partition("="))
        if not name or not folder or name in folders:
            raise UserError(f"environment variable {VARIABLE}: {part!r} is not name=folder; {REMEDY}")
        folders[name] = Path(folder).expanduser()
    return folders, Steer()


def _published(run: str) -> tuple[dict[str, Path], Steer]:
    try:
        config, store = open_run(run)
    except StoreError as error:
        raise UserError(f"environment variable {VARIABLE}: {error}") from None
    folders = fetch_published(store)
    if not folders:
        raise UserError(
            f"environment variable {VARIABLE}: {store.root} has published no value model: run it to its end"
        )
    return folders, config.steer
