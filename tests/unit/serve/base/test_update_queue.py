"""Updates from a thread to an event loop: in bundles, in order, none lost, none delayed without need."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mavis_dist.decode import Candidate, Choice, FinishReason, TokenLogprobs, Update
from serve.base.update_queue import Mailbox, joined
from serve.timeouts import within


def update(start: int, is_end: bool = False, id: str = "r") -> Update:
    return Update(id, 0, start, (start,), Choice(0, finish=FinishReason.STOP) if is_end else None)


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
        assert [token for bundle in bundles for u in bundle for token in u.tokens] == list(range(count))

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
        [both] = await within(5, second)
        assert (both.start, both.tokens, both.finished.finish) == (1, (1, 2), FinishReason.STOP)

    asyncio.run(scenario())


def test_only_the_request_that_cannot_wait_leaves_before_the_tick():
    async def scenario():
        box = Mailbox(interval_s=60)
        box.put(update(0, id="a"))
        await box.take(5)
        box.put(update(1, id="a"))
        box.put(update(0, id="b"))  # its first
        assert [u.request_id for u in await within(5, box.take(5))] == ["b"]
        box.put(update(1, id="b", is_end=True))
        box.put(update(2, id="a"))
        [ending] = await within(5, box.take(5))
        assert (ending.request_id, ending.tokens) == ("b", (1,))
        box.put(update(3, is_end=True, id="a"))
        [rest] = await within(5, box.take(5))
        assert (rest.request_id, rest.start, rest.tokens) == ("a", 1, (1, 2, 3))

    asyncio.run(scenario())


def test_many_requests_arrive_in_order_and_whole():
    async def scenario():
        box, count, ids = Mailbox(interval_s=0.002), 200, [f"r{i}" for i in range(5)]

        def write():
            for start in range(count):
                for id in ids:
                    box.put(update(start, start == count - 1, id))

        writer = threading.Thread(target=write)
        writer.start()
        tokens, num_left = {id: [] for id in ids}, len(ids)
        while num_left:
            for one in await box.take(5):
                assert one.start == len(tokens[one.request_id])
                tokens[one.request_id] += one.tokens
                num_left -= one.finished is not None
        writer.join()
        assert all(tokens[id] == list(range(count)) for id in ids)

    asyncio.run(scenario())


def test_without_an_interval_nothing_waits():
    async def scenario():
        box = Mailbox()
        for start in range(3):
            box.put(update(start))
            assert [u.start for u in await within(5, box.take(60))] == [start]

    asyncio.run(scenario())


def test_the_updates_of_a_bundle_become_one_per_choice():
    parts = [
        Update("r", index, start, (start,), logprobs=(TokenLogprobs(Candidate(start, -1.0, 0.0), 0.0, ()),))
        for start in range(3)
        for index in range(2)
    ]
    ending = Update("r", 1, 3, (), Choice(1, finish=FinishReason.STOP))
    first, second = joined([*parts, ending])
    assert [(u.index, u.start, u.tokens) for u in (first, second)] == [(0, 0, (0, 1, 2)), (1, 0, (0, 1, 2))]
    assert [one.chosen.token for one in second.logprobs] == [0, 1, 2]
    assert first.finished is None
    assert second.finished is ending.finished


def test_streams_send_at_the_same_time():
    async def scenario():
        boxes = [Mailbox(interval_s=0.3) for _ in range(5)]
        times = []

        async def read(box):
            await box.take(5)
            box.put(update(1))
            await box.take(5)
            times.append(time.monotonic())

        readers = []
        for box in boxes:
            box.put(update(0))
            readers.append(asyncio.create_task(read(box)))
            await asyncio.sleep(0.011)
        await asyncio.gather(*readers)
        ticks = sorted({round(at / 0.3) for at in times})
        assert len(ticks) <= 2  # they began within 55 ms
        assert all(abs(at / 0.3 - round(at / 0.3)) < 0.4 for at in times)

    asyncio.run(scenario())


def test_the_event_loop_is_woken_once_per_bundle():
    async def scenario():
        box, calls = Mailbox(interval_s=0.01), 0
        wake = box._events.call_soon_threadsafe

        class Counted:
            def call_soon_threadsafe(self, *arguments):
                nonlocal calls
                calls += 1
                wake(*arguments)

        box.put(update(0))
        assert await box.take(5)
        box._events = Counted()
        for count in (1, 2):
            for start in range(100):
                box.put(update(start))
            [bundle] = await box.take(5)
            assert len(bundle.tokens) == 100
            assert calls == count

    asyncio.run(scenario())


def test_no_update_is_left_behind():
    async def scenario():
        box, count, num_taken = Mailbox(), 50_000, 0

        def write():
            for start in range(count):
                box.put(update(start))
                if start % 3 == 0:
                    time.sleep(0)  # lets the reader in

        writer = threading.Thread(target=write)
        writer.start()
        while num_taken < count:
            bundle = await box.take(10)
            assert bundle, "updates wait, and nobody says so"
            num_taken += sum(len(one.tokens) for one in bundle)
        writer.join()

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
