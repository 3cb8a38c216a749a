"""Updates from a thread to an event loop: in bundles, in order, none lost, none delayed without need."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mavis_dist.decode import Choice, FinishReason, Update
from serve.base.update_queue import Mailbox
from serve.timeouts import within


def update(start: int, is_end: bool = False) -> Update:
    return Update("r", 0, start, (start,), Choice(0, finish=FinishReason.STOP) if is_end else None)


@pytest.mark.parametrize("interval_s", [0.0, 0.003, 60.0])
def test_all_arrive_in_order(interval_s):
    async def scenario():
        box, count = Mailbox(interval_s), 500

        def write():
            for start in range(count):
                box.put(update(start, is_end=start == count - 1))

        writer = threading.Thread(target=write)
        writer.start()
        bundles = [await box.take(5)]
        while bundles[-1][-1].finished is None:
            bundles.append(await box.take(5))
        writer.join()
        assert [u.start for bundle in bundles for u in bundle] == list(range(count))

    asyncio.run(scenario())


def test_only_updates_in_the_middle_are_delayed():
    async def scenario():
        box = Mailbox(interval_s=60)
        box.put(update(0))
        assert len(await box.take(5)) == 1
        box.put(update(1))
        second = asyncio.create_task(box.take(5))
        await asyncio.sleep(0.05)
        assert not second.done()
        box.put(update(2, is_end=True))
        assert [u.start for u in await within(5, second)] == [1, 2]

    asyncio.run(scenario())


def test_without_an_interval_nothing_waits():
    async def scenario():
        box = Mailbox()
        for start in range(3):
            box.put(update(start))
            assert [u.start for u in await within(5, box.take(60))] == [start]

    asyncio.run(scenario())


def test_a_timeout_gives_an_empty_bundle_and_loses_nothing():
    async def scenario():
        box = Mailbox(interval_s=0.01)
        assert await box.take(0.01) == []
        box.put(update(0))
        assert len(await box.take(5)) == 1
        assert await box.take(0.01) == []

    asyncio.run(scenario())


def test_a_closed_loop_raises():
    async def make():
        return Mailbox()

    with pytest.raises(RuntimeError):
        asyncio.run(make()).put(update(0))


@pytest.mark.parametrize("num_turns", range(6))
def test_a_cancellation_wins_over_a_result_that_comes_with_it(num_turns):
    async def scenario():
        result = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(5, result))
        await asyncio.sleep(0.01)
        result.set_result("late")
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())


def test_a_wait_ends_in_time_with_its_result():
    async def scenario():
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, asyncio.sleep(5))
        assert await within(5, asyncio.sleep(0, "result")) == "result"
        cancelled = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):  # not mistaken for a wait that took too long
            await within(5, cancelled)
        with pytest.raises(StopAsyncIteration):
            await within(5, anext(aiter_of_nothing()))

    async def aiter_of_nothing():
        return
        yield

    asyncio.run(scenario())
