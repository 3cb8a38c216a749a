"""One engine in one thread: takes requests from any thread, sends updates to any event loop. Knows nothing of Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from mavis_dist.decode import Engine, FinishReason, LengthError, Request, RequestError, Update
from serve.base.fair_queue import FairQueue
from serve.base.update_queue import Mailbox
from serve.messages import ANYBODY, Admission, EngineStopped, Full, Message, Refused

logger = logging.getLogger(__name__)

FAILURES_UNTIL_UNHEALTHY = 3
QUEUE_PER_ROW = 4  # rows that may wait per row of the engine, by default


@dataclass
class _Job:
    """A request that was accepted and is not finished."""

    request: Request  # validated
    on_update: Callable[[Update], None]
    left: int  # choices not finished yet
    began: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of the engine for the remaining choices."""
        return self.left * (1 + len(self.request.preferences))


class EngineLoop:
    """Steps the engine as long as it has requests.

    Requests wait here, where keys take turns, and go to the engine when there are rows for them. A step that fails ends
    all requests in the engine with FinishReason.ERROR and the reason; the engine continues with the next ones.
    """

    def __init__(self, engine: Engine, step_limit_s: float = 300.0, queue: int | None = None, name: str = ""):
        """
        Args:
            step_limit_s: a step that takes longer counts as hanging.
            queue: rows that may wait; none: four times the rows of the engine.
            name: of this engine, given to refused requests so that they avoid it.
        """
        self._engine = engine
        self._step_limit_s = step_limit_s
        self._name = name
        self._wake = threading.Condition()  # guards the four below
        self._queue: FairQueue[_Job] = FairQueue(QUEUE_PER_ROW * engine.max_rows if queue is None else queue)
        self._open: dict[str, _Job] = {}  # in the engine, or on the way
        self._inbox: list[Callable[[], object]] = []
        self._is_cache_full = False  # the engine has free rows, but no cache for them
        self._held_s = 1.0  # moving average of a request's time in the engine
        self._stopping = False
        self._failures = 0
        self._last_failure = ""
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Rows in use and rows waiting."""
        with self._wake:
            return self._rows_in_use, self._queue.rows

    def submit(
        self, request: Request, on_update: Callable[[Update], None], admission: Admission = ANYBODY
    ) -> Request | Full:
        """Queue a request, if there is room; `on_update` is called in the engine's thread and must return at once.

        Raises:
            RequestError: naming the field, its value and the remedy.
            EngineStopped: if the engine thread cannot serve it.
        """
        self.check()
        request = self._engine.validate(request)
        job = _Job(request, on_update, request.params.n)
        with self._wake:
            if not self._queue.admits(admission, job.rows):
                return Full(self._name, self._held_s * self._queue.rows / self._engine.max_rows)
            self._queue.add(None if admission.is_resumed else admission.key, request.id, job.rows, job)
            self._begin()
        return request

    def cancel(self, request_id: str) -> None:
        """Stop a request; nothing happens if it is finished."""
        with self._wake:
            if not self._queue.remove(request_id):
                self._inbox.append(partial(self._drop, request_id))
            self._begin()

    def between_steps(self, command: Callable[[], object]) -> Future[None]:
        """Run a command in the engine's thread, between the current step and the next one."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # the caller's; the engine continues
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
        """End the thread after the current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def _rows_in_use(self) -> int:
        return sum(job.rows for job in self._open.values())

    def _begin(self) -> None:
        """Hand requests to the engine, in turn, while it has rows for them. Needs the lock."""
        while (job := self._queue.head()) is not None and self._fits(job):
            self._queue.pop()
            job.began = time.monotonic()
            self._open[job.request.id] = job
            self._inbox.append(partial(self._engine.enqueue, job.request))
        self._wake.notify()

    def _fits(self, job: _Job) -> bool:
        if self._is_cache_full:
            return False
        # Choices of a request that needs more rows than there are take them one after another.
        return not self._open or self._rows_in_use + job.rows <= self._engine.max_rows

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

    def _drop(self, request_id: str) -> None:
        if request_id in self._open:
            self._engine.cancel(request_id)
            with self._wake:
                del self._open[request_id]
                self._begin()

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            updates = self._engine.step()
            self._failures = 0
        # Any failure must reach the clients of the open requests.
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._failures += 1
            self._last_failure = f"{type(error).__name__}: {error}"
            updates = self._abandon()
        finally:
            self._step_began = None
        for update in updates:
            self._deliver(update)
        with self._wake:
            self._is_cache_full = self._engine.load[1] > 0
            self._begin()

    def _abandon(self) -> list[Update]:
        with self._wake:
            begun = list(self._open)
        updates = [update for request_id in begun for update in self._engine.cancel(request_id)]
        for update in updates:
            assert update.finished is not None
            update.finished.finish, update.finished.error = FinishReason.ERROR, self._last_failure
        return updates

    def _deliver(self, update: Update) -> None:
        job = self._open.get(update.request_id)
        if job is None:
            return
        if update.finished is not None:
            self._close_choice(job)
        try:
            job.on_update(update)
        except RuntimeError:  # the event loop behind it is closed
            self._drop(update.request_id)

    def _close_choice(self, job: _Job) -> None:
        with self._wake:
            job.left -= 1
            if not job.left:
                del self._open[job.request.id]
                self._held_s += 0.2 * (time.monotonic() - job.began - self._held_s)


async def stream(
    loop: EngineLoop,
    request: Request,
    admission: Admission = ANYBODY,
    heartbeat_s: float = 5.0,
    interval_s: float = 0.0,
) -> AsyncGenerator[Message, None]:
    """The accepted request (or why it is refused), then lists of updates; an empty list means: still waiting.

    Closing the iterator early cancels the request. `interval_s`: least time between two lists.
    """
    updates = Mailbox(interval_s)
    accepted = submitted(loop, request, updates.put, admission)
    if not isinstance(accepted, Request):
        yield accepted
        return
    left = accepted.params.n
    try:
        yield accepted
        while left:
            chunk = await updates.take(heartbeat_s)
            left -= sum(update.finished is not None for update in chunk)
            yield chunk
    finally:
        if left:
            loop.cancel(accepted.id)


def submitted(
    loop: EngineLoop, request: Request, on_update: Callable[[Update], None], admission: Admission
) -> Request | Refused | Full:
    """The accepted request, or why it is refused."""
    try:
        return loop.submit(request, on_update, admission)
    except RequestError as error:
        return Refused(error.field, error.message, isinstance(error, LengthError))
