"""Threads that run transactions, so that the event loop never waits for a disk.

An instance file belongs to one lane, which runs its transactions in the order in which they were given. Answers come back to the loop together:
one wake-up for all that ended meanwhile.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["Lane", "Lanes"]

P = ParamSpec("P")
T = TypeVar("T")
Work = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class Lane:
    """One thread and its queue."""

    def __init__(
        self, answer: Callable[[asyncio.Future[Any], Any, BaseException | None], None], loop: asyncio.AbstractEventLoop, name: str
    ) -> None:
        self._answer = answer
        self._loop = loop
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run something after all that was submitted before. Call from the loop's thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((lambda: work(*args, **kwargs), future))
        return future

    def stop(self) -> threading.Thread:
        """Let the thread end after what waits."""
        self._queue.put(None)
        return self._thread

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            value, error = None, None
            try:
                value = work()
            except BaseException as failure:  # whatever it is belongs to the caller
                error = failure
            self._answer(future, value, error)


class Lanes:
    """A few lanes, given out in turn."""

    def __init__(self, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._is_waking = False
        self._lanes: list[Lane] = []
        self._count = count
        self._turn = 0

    def next(self) -> Lane:
        """Return a lane for a file."""
        self._turn += 1
        if len(self._lanes) < self._count:
            self._lanes.append(Lane(self._answer, self._loop, f"workflow lane {len(self._lanes)}"))
            return self._lanes[-1]
        return self._lanes[self._turn % self._count]

    def _answer(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self._answers.append((future, value, error))
        if not self._is_waking:
            self._is_waking = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_waking = False  # first: what is appended from now on wakes again
        while self._answers:
            future, value, error = self._answers.popleft()
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

    async def close(self) -> None:
        """Run what waits, and end the threads."""
        threads = [lane.stop() for lane in self._lanes]
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
        self._deliver()
