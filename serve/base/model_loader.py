"""Loads versions of value models into a running base replica's engine, and drops them. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from mavis_dist.decode import Choice, FinishReason, LocalGuide, Request, Update
from mavis_dist.decode.load_guide import load_models, load_students, read_card
from mavis_dist.models.load import BaseModel
from mavis_dist.models.value import Card
from mavis_dist.store import values
from mavis_dist.store.files import Store, StoreError
from mavis_dist.types import UserError
from serve.base.engine_loop import EngineLoop
from serve.base.remote_guide import RemoteGuide
from serve.messages import Message
from serve.model_cache import ModelCache, Unavailable, loaded

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0

Names = tuple[str, ...]  # versions


class ModelLoader(ABC):
    """Loads the models that requests name, in threads, and adds them to the guide between two steps of the engine.

    A request waits until its own models are loaded, never for those of other requests.
    """

    def __init__(
        self, store: Store, base: BaseModel, guide: LocalGuide | RemoteGuide, loop: EngineLoop, idle_s: float = 300.0
    ):
        """`idle_s`: seconds that a model which is no longer published stays after its last use."""
        self._store, self._base, self._guide, self._loop = store, base, guide, loop
        self._keys: dict[str, str] = {}  # by version
        self.cache: ModelCache[Names] = ModelCache(self._load, self._published, self._drop, idle_s)

    @abstractmethod
    def begin(self) -> None:
        """Prepare for the published models. A model that cannot be used fails the requests that name it.

        Raises:
            Unavailable: if none of them can be used: then this base model is the cause.
        """

    async def stream(self, request: Request, messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
        """`messages` of a request, begun when its models are loaded; an empty list means: still loading."""
        try:
            keys = {await self._known_key(version) for version in request.weights}
            with self.cache.hold(keys) as loads:
                while not await loaded(loads, HEARTBEAT_S):
                    yield []
                async with aclosing(messages):
                    async for message in messages:
                        yield message
        except StoreError as error:
            yield _failure(request, str(error))
        except Unavailable as error:  # its reason may name folders, which clients should not see
            yield _failure(request, f"the value model {error.name} cannot be loaded; the service's log says why")

    async def _known_key(self, version: str) -> str:
        if version not in self._keys:
            self._keys[version] = await asyncio.to_thread(self._key, version)
        return self._keys[version]

    @abstractmethod
    def _key(self, version: str) -> str:
        """The key of what to load for a version, which never changes; raises StoreError if it is no version."""

    @abstractmethod
    def _load(self, key: str) -> Names: ...

    @abstractmethod
    def _published(self) -> set[str]:
        """The keys of the published models."""

    def _drop(self, names: Names) -> None:
        self._loop.between_steps(partial(self._guide.remove, names))

    def _check(self, folder: str) -> Card:
        """The card of a finished value model of this base model; raises StoreError or ValueModelError."""
        card = read_card(self._store, folder)
        card.check(self._base.fingerprint, self._base.tokenizer_fingerprint)
        return card


class LocalModelLoader(ModelLoader):
    """Value models in this process, loaded by folder: several objectives may share one."""

    _guide: LocalGuide

    def begin(self) -> None:
        with self.cache.hold(self._published()) as loads:
            failures = [load.exception() for load in loads]
        if failures and all(failures):
            raise failures[0]  # type: ignore[misc]

    def _key(self, version: str) -> str:
        return values.model_folder(self._store, values.folder_of(version))

    def _load(self, key: str) -> Names:
        card = self._check(key)
        paths = dict.fromkeys(card.objectives, values.fetch_folder(self._store, key))
        dtype = next(self._base.model.parameters()).dtype
        models = load_models(paths, dtype, str(self._base.model.device), self._base)
        students = load_students(paths, models)
        version = {name: values.version(name, key) for name in card.objectives}
        add = partial(
            self._guide.add,
            {version[name]: model for name, model in models.items()},
            {version[name]: student for name, student in students.items()},
        )
        self._loop.between_steps(add).result()
        return tuple(version.values())

    def _published(self) -> set[str]:
        return set(values.published_folders(self._store).values())


class RemoteModelLoader(ModelLoader):
    """Value models in value replicas, which load them before the engine asks."""

    _guide: RemoteGuide

    def begin(self) -> None:
        """Checks the cards only: value replicas may start later than base replicas."""
        failures: list[Unavailable | None] = []
        for version in self._published():
            try:
                self._check(values.folder_of(version))
            except UserError as error:
                logger.error("%s cannot be used: %s", version, error)
                failures.append(Unavailable(version, str(error)))
            else:
                failures.append(None)
        if failures and all(failures):
            raise failures[0]  # type: ignore[misc]

    def _key(self, version: str) -> str:
        values.folder_of(version)
        return version

    def _load(self, key: str) -> Names:
        self._check(values.folder_of(key))
        self._guide.wait_until_ready(key)
        self._loop.between_steps(partial(self._guide.add, (key,))).result()
        return (key,)

    def _published(self) -> set[str]:
        return {model.version for model in values.served(self._store).values()}


def _failure(request: Request, error: str) -> Message:
    choice = Choice(0, finish=FinishReason.ERROR, error=error)
    return [Update(request.id, 0, len(request.answer), (), choice)]
