"""Signals, and calls of other threads, as bytes of a pipe that the main thread waits for.

The interpreter writes the number of a signal itself (`signal.set_wakeup_fd`). A handler in Python runs only once the main thread is back from its wait,
and a signal that comes a moment before the wait begins does not end it; an exception that a handler raises may be swallowed wherever it lands.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable

__all__ = ["SignalPipe"]


def _ignore(number: int, frame: object) -> None:
    """Nothing is to be done at once: the number comes through the pipe."""


class SignalPipe:
    """The pipe. `wake` may be called from any thread and from signal handlers; `select` takes it."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)

    def take(self, numbers: Iterable[int], handler: Callable[[int, object], None] = _ignore) -> None:
        """Let signals arrive here, and call `handler` with each, too. Nothing but the main thread can do this: in others nothing happens."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            for number in numbers:
                signal.signal(number, handler)

    def wake(self) -> None:
        """Let `wait` return."""
        with contextlib.suppress(BlockingIOError):  # full: it will be read
            os.write(self._writer, b"\0")

    def wait(self) -> bytes:
        """Sleep until something arrives; returns the numbers of signals, and 0 for what is no signal."""
        select.select([self._reader], [], [])
        return os.read(self._reader, 4096)

    def fileno(self) -> int:
        """Return the descriptor that can be read when something has arrived."""
        return self._reader
