"""SIGTERM and Ctrl-C during a job."""

from __future__ import annotations

import signal
import threading

import pytest

from mavis_dist.cluster import check_stop, stop_on_signals
from mavis_dist.types import Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_stages_to_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals():
        check_stop()
        signal.raise_signal(number)
        with pytest.raises(Stopped):
            check_stop()
        assert signal.getsignal(number) in (
            signal.SIG_DFL,
            signal.default_int_handler,
        )  # ends the process
    assert signal.getsignal(number) is before
    check_stop()


def test_a_second_interrupt_ends_at_once() -> None:
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_handlers_do_not_change() -> None:
    def look() -> None:
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
