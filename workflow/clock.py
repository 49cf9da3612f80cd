"""Time: the wall clock for what is recorded, the monotonic clock for waiting, and one heap of what is due."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime

from workflow.values import iso

__all__ = ["Clock", "Timer", "Timers"]


_MILLISECONDS = "".join(f"{number:03d}Z" for number in range(1000))


class Clock:
    """The machine's clocks."""

    _made = (0, "1970-01-01T00:00:00.")
    """A second and its text, in one piece: several threads ask."""

    def now(self) -> datetime:
        """Return the wall clock, in UTC."""
        return datetime.now(UTC)

    def stamp(self) -> str:
        """Return the wall clock as it is recorded: `iso(now())`. It is asked three times at every step, and a second's text is made once."""
        second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
        made, text = self._made
        if second != made:
            text = iso(datetime.fromtimestamp(second, UTC))[:-4]
            self._made = (second, text)
        return text + _MILLISECONDS[4 * millisecond : 4 * millisecond + 4]

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def delay_s(self, due: float) -> float | None:
        """Return how long the event loop should sleep for a monotonic time; None when somebody else moves the clock."""
        return max(0.0, due - self.monotonic())


class Timer:
    """Something that is due at a monotonic time."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None] | None) -> None:
        self.due = due
        self.callback = callback

    def cancel(self) -> None:
        """Forget it. Its place in the heap goes when its time comes."""
        self.callback = None


class Timers:
    """A heap of timers and one alarm of the event loop for the first of them."""

    def __init__(self, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self.clock = clock
        self._loop = loop
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None

    def at(self, due: float, callback: Callable[[], None]) -> Timer:
        """Call back at a monotonic time."""
        timer = Timer(due, callback)
        heapq.heappush(self._heap, (due, next(self._count), timer))
        if self._heap[0][2] is timer:
            self._arm()
        return timer

    def next_due(self) -> float | None:
        """Return when the first timer is due."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def fire(self) -> None:
        """Call back what is due."""
        now = self.clock.monotonic()
        while (due := self.next_due()) is not None and due <= now:
            callback = heapq.heappop(self._heap)[2].callback
            if callback is not None:
                callback()
        self._arm()

    def close(self) -> None:
        """Forget all."""
        self._heap.clear()
        self._arm()

    def _arm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = self.next_due()
        delay = None if due is None else self.clock.delay_s(due)
        if delay is not None:
            self._alarm = self._loop.call_later(min(delay, 3600.0), self.fire)
