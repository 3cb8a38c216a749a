"""How versions of value models come to a base replica's engine while it runs, and leave it. Knows nothing of Ray."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path

from mavis_dist.decode import Choice, FinishReason, LocalGuide, Request, Update
from mavis_dist.decode.load_guide import load_models, load_students
from mavis_dist.models import value
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
    """Loads what requests name, in threads, and hands it to the guide between two steps of the engine.

    Requests wait until the models that they name are there; nobody waits for the models of others.
    """

    def __init__(
        self, store: Store, base: BaseModel, guide: LocalGuide | RemoteGuide, loop: EngineLoop, idle_s: float = 300.0
    ):
        """`idle_s`: how long a model that is not published any more stays after its last use."""
        self._store, self._base, self._guide, self._loop = store, base, guide, loop
        self.cache: ModelCache[Names] = ModelCache(self._load, self._published, self._drop, idle_s)

    @abstractmethod
    def begin(self) -> None:
        """Prepare for what is published. What cannot be used is left to the requests that name it.

        Raises:
            Unavailable: if nothing of it can be used: then it is this base model that is at fault.
        """

    async def stream(self, request: Request, messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
        """`messages` of a request, begun when its models are there; an empty list says: still loading."""
        try:
            keys = {self._key(version) for version in request.weights}
            with self.cache.hold(keys) as loads:
                while not await loaded(loads, HEARTBEAT_S):
                    yield []
                async with aclosing(messages):
                    async for message in messages:
                        yield message
        except StoreError as error:
            yield _failure(request, str(error))
        except Unavailable as error:  # its reason may name folders, which are not the client's business
            yield _failure(request, f"the value model {error.name} cannot be loaded; the service's log says why")

    @abstractmethod
    def _key(self, version: str) -> str:
        """What has to be loaded for a version; raises StoreError for what is no version."""

    @abstractmethod
    def _load(self, key: str) -> Names: ...

    @abstractmethod
    def _published(self) -> set[str]:
        """The keys of what is published."""

    def _drop(self, names: Names) -> None:
        self._loop.between_steps(partial(self._guide.remove, names))

    def _check(self, folder: str) -> tuple[Path, Card]:
        """A finished value model of this base model; raises StoreError or ValueModelError."""
        path = values.fetch_folder(self._store, folder)
        card = value.load_card(path)
        card.check(self._base.fingerprint, self._base.tokenizer_fingerprint)
        return path, card


class LocalModelLoader(ModelLoader):
    """Value models in this process, a folder at a time, so that the objectives of a distilled model share it."""

    _guide: LocalGuide

    def begin(self) -> None:
        with self.cache.hold(self._published()) as loads:
            failures = [load.exception() for load in loads]
        if failures and all(failures):
            raise failures[0]  # type: ignore[misc]

    def _key(self, version: str) -> str:
        return values.folder_of(version)

    def _load(self, key: str) -> Names:
        path, card = self._check(key)
        paths = dict.fromkeys(card.objectives, path)
        dtype = next(self._base.model.parameters()).dtype
        models = load_models(paths, dtype, str(self._base.model.device))
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
    """Value models behind calls: value replicas load them, and the engine asks for them when they have."""

    _guide: RemoteGuide

    def begin(self) -> None:
        """Value replicas may come later than base replicas, so that only the cards are looked at."""
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
        self._guide.reach(key)
        self._loop.between_steps(partial(self._guide.add, (key,))).result()
        return (key,)

    def _published(self) -> set[str]:
        return {model.version for model in values.served(self._store).values()}


def _failure(request: Request, error: str) -> Message:
    choice = Choice(0, finish=FinishReason.ERROR, error=error)
    return [Update(request.id, 0, len(request.answer), (), choice)]
