"""One engine in one thread, with requests from any thread and updates to any event loop. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass

from mavis_dist.decode import Engine, FinishReason, Request, RequestError, Update

logger = logging.getLogger(__name__)

FAILURES_UNTIL_UNHEALTHY = 3


class EngineStopped(RuntimeError):
    """The engine thread does not run any more, or hangs."""


@dataclass(frozen=True)
class Refused:
    """The engine does not take a request; a value, because it crosses processes."""

    field: str
    message: str


class EngineLoop:
    """Steps the engine as long as there is something to write.

    A step that fails ends all open requests with FinishReason.ERROR and the reason; the engine goes on with new ones.
    """

    def __init__(self, engine: Engine, step_limit_s: float = 300.0):
        """A step that takes longer than `step_limit_s` counts as hanging."""
        self._engine = engine
        self._step_limit_s = step_limit_s
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._open: dict[str, Callable[[Update], None]] = {}
        self._left: dict[str, int] = {}  # request -> choices not finished yet
        self._stopping = False
        self._failures = 0
        self._last_failure = ""
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Answers being written and answers waiting."""
        return self._engine.load

    def submit(self, request: Request, on_update: Callable[[Update], None]) -> Request:
        """Queue a request; `on_update` is called in the engine's thread and must return at once.

        Raises:
            RequestError: naming the field, its value and the remedy.
            EngineStopped: if no thread is there to serve it.
        """
        self.check()
        request = self._engine.prepare(request)
        self._post(lambda: self._start(request, on_update))
        return request

    def cancel(self, request_id: str) -> None:
        """Stop a request; nothing happens if it is finished."""
        self._post(lambda: self._drop(request_id))

    def between_steps(self, command: Callable[[], object]) -> Future[None]:
        """Have a command run in the engine's thread, after the step under way and before the next one."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # the caller's; the engine goes on
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._wake:
            self._inbox.append(run)
            self._wake.notify()
        return done

    def check(self) -> None:
        """Raises EngineStopped if the thread is gone, hangs in a step, or fails at every step."""
        if not self._thread.is_alive():
            raise EngineStopped("the engine's thread has ended")
        if self._step_began is not None and time.monotonic() - self._step_began > self._step_limit_s:
            raise EngineStopped(f"a step of the engine takes longer than {self._step_limit_s:g} s")
        if self._failures >= FAILURES_UNTIL_UNHEALTHY:
            raise EngineStopped(f"the engine's last {self._failures} steps failed: {self._last_failure}")

    def stop(self) -> None:
        """End the thread after the step under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._stopping or not self._engine.is_idle)
                commands, self._inbox = self._inbox, []
                if self._stopping:
                    return
            for command in commands:
                command()
            self._step()

    def _start(self, request: Request, on_update: Callable[[Update], None]) -> None:
        self._engine.submit(request)
        self._open[request.id], self._left[request.id] = on_update, request.params.n

    def _drop(self, request_id: str) -> None:
        if request_id in self._open:
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _forget(self, request_id: str) -> None:
        del self._open[request_id], self._left[request_id]

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            updates = self._engine.step()
            self._failures = 0
        # Whatever went wrong, the clients behind the open requests must hear of it.
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._failures += 1
            self._last_failure = f"{type(error).__name__}: {error}"
            updates = self._abandon()
        finally:
            self._step_began = None
        for update in updates:
            self._deliver(update)

    def _abandon(self) -> list[Update]:
        updates = [update for request_id in self._open for update in self._engine.cancel(request_id)]
        for update in updates:
            assert update.finished is not None
            update.finished.finish, update.finished.error = FinishReason.ERROR, self._last_failure
        return updates

    def _deliver(self, update: Update) -> None:
        on_update = self._open.get(update.request_id)
        if on_update is None:
            return
        if update.finished is not None:
            self._left[update.request_id] -= 1
            if not self._left[update.request_id]:
                self._forget(update.request_id)
        try:
            on_update(update)
        except RuntimeError:  # the event loop behind it is closed
            self._drop(update.request_id)


async def stream(
    loop: EngineLoop, request: Request, heartbeat_s: float = 5.0
) -> AsyncIterator[Request | Refused | list[Update]]:
    """The accepted request (or why it is refused), then lists of updates; an empty list says: still waiting.

    Closing the iterator early cancels the request.
    """
    events = asyncio.get_running_loop()
    updates: asyncio.Queue[Update] = asyncio.Queue()
    try:
        accepted = loop.submit(request, lambda update: _put(events, updates, update))
    except RequestError as error:
        yield Refused(error.field, error.message)
        return
    left = accepted.params.n
    try:
        yield accepted
        while left:
            chunk = await _next_updates(updates, heartbeat_s)
            left -= sum(update.finished is not None for update in chunk)
            yield chunk
    finally:
        if left:
            loop.cancel(accepted.id)


def _put(events: asyncio.AbstractEventLoop, queue: asyncio.Queue[Update], update: Update) -> None:
    events.call_soon_threadsafe(queue.put_nowait, update)


async def _next_updates(queue: asyncio.Queue[Update], limit_s: float) -> list[Update]:
    """All updates that are there, at least one unless none comes in time."""
    try:
        chunk = [await asyncio.wait_for(queue.get(), limit_s)]
    except asyncio.TimeoutError:
        return []
    while not queue.empty():
        chunk.append(queue.get_nowait())
    return chunk
