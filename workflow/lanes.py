"""Threads that run transactions, so that the event loop never waits for a disk.

An instance file belongs to one lane, which runs its transactions in the order in which they were given. Answers come back to the loop together:
one wake-up for all that ended meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["Lane", "Lanes", "Then", "settle"]

P = ParamSpec("P")
T = TypeVar("T")
Then = Callable[[Any, BaseException | None], None]
"""Gets what some work returned, or raised."""


class Lane:
    """One thread and its queue."""

    def __init__(self, answer: Callable[[Then, Any, BaseException | None], None], loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._answer = answer
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], Then] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run something after all that was submitted before. Call from the loop's thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.give(partial(settle, future), partial(work, *args, **kwargs))
        return future

    def give(self, then: Then, work: Callable[..., object], /, *args: object) -> None:
        """Run something after all that was submitted before, and call back in the loop's thread, with no context of anybody.

        For what is done at every step: a future and its callbacks cost three turns of the event loop, this none.
        """
        self._queue.put((work, args, then))

    def stop(self) -> threading.Thread:
        """Let the thread end after what waits."""
        self._queue.put(None)
        return self._thread

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, args, then = item
            value, error = None, None
            try:
                value = work(*args)
            except BaseException as failure:  # whatever it is belongs to the caller
                error = failure
            self._answer(then, value, error)
            del item, work, args, then, value, error  # nothing of a run that has left stays here until the next


def settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Answer somebody, who may have gone."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


class Lanes:
    """A few lanes, given out in turn."""

    def __init__(self, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers: deque[tuple[Then, Any, BaseException | None]] = deque()
        self._is_waking = False
        # Half of what `call_soon_threadsafe` costs, and it is done at every step.
        self._woken, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        contextvars.Context().run(self._loop.add_reader, self._woken, self._deliver)
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

    def _answer(self, then: Then, value: Any, error: BaseException | None) -> None:
        self._answers.append((then, value, error))
        if not self._is_waking:
            self._is_waking = True
            os.write(self._wakes, b"!")

    def _deliver(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 1 << 10)
        self._is_waking = False  # after reading, or its byte is lost; before looking: what is appended from now on wakes again
        try:
            while self._answers:
                then, value, error = self._answers.popleft()
                then(value, error)
        finally:
            if self._answers:  # a callback failed: the others' answers come all the same
                self._loop.call_soon(self._deliver)

    async def close(self) -> None:
        """Run what waits, and end the threads."""
        threads = [lane.stop() for lane in self._lanes]
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
        self._deliver()
        self._loop.remove_reader(self._woken)
        os.close(self._woken)
        os.close(self._wakes)
