"""SIGINT and SIGTERM as a flag, so that a training step and its checkpoint end whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopSignal:
    """Number of the first signal that came, or None."""

    number: int | None = None


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM while the context lasts; a second one raises KeyboardInterrupt at once.

    Signals can only be caught in the main thread; elsewhere the flag is never set.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.number is not None:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        stop.number = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
