"""Threads that run transactions and plain functions, so that the event loop never waits for a disk, or for a user's code.

An instance file belongs to one lane, which runs its transactions in the order in which they were given. Two wake-ups are what a transaction costs beside
itself: that of the lane, when the loop has done all that an answer led to, so that the two do not get into each other's way; and that of the loop, one for
all that ended meanwhile.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["Lane", "Lanes", "Pool", "Then", "settle"]

P = ParamSpec("P")
T = TypeVar("T")
Then = Callable[[Any, BaseException | None], None]
"""Gets what some work returned, or raised."""
Answer = Callable[[Then, Any, BaseException | None], None]
Work = tuple[Then, Callable[..., object], tuple[Any, ...]]


def _do(answer: Answer, then: Then, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    value, error = None, None
    try:
        value = work(*args)
    except BaseException as failure:  # whatever it is belongs to the caller
        error = failure
    answer(then, value, error)


class Lane:
    """One thread and its queue."""

    def __init__(self, answer: Answer, fill: Callable[[Lane], None], loop: asyncio.AbstractEventLoop, name: str) -> None:
        """`fill`: called when it is given something, for which `start` is to be called soon."""
        self._answer = answer
        self._fill = fill
        self._loop = loop
        self._given: list[Work] = []
        self._queue: queue.SimpleQueue[list[Work] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run something after all that was submitted before. Call from the loop's thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.give(partial(settle, future), partial(work, *args, **kwargs))
        return future

    def give(self, then: Then, work: Callable[..., object], /, *args: object) -> None:
        """Run something after all that was submitted before, and call back in the loop's thread, with no context of anybody and in no task.

        For what is done at every step: a future and its callbacks cost three turns of the event loop, this none.
        """
        if not self._given:
            self._fill(self)
        self._given.append((then, work, args))

    def start(self) -> None:
        """Let the thread begin with what it was given."""
        self._queue.put(self._given)
        self._given = []

    def stop(self) -> threading.Thread:
        """Let the thread end after what it has begun with."""
        self._queue.put(None)
        return self._thread

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            given.reverse()
            while given:
                _do(self._answer, *given.pop())
            # nothing of a run that has left stays here until the next


def settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Answer somebody, who may have gone."""
    if future.done():
        return
    if isinstance(error, StopIteration):  # no future takes one; this is what Python itself makes of one that leaves a coroutine
        made = RuntimeError("the function raised StopIteration")
        made.__cause__ = error
        future.set_exception(made)
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


class Lanes:
    """A few lanes, given out in turn."""

    def __init__(self, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers: deque[tuple[Then, Any, BaseException | None]] = deque()
        self._filled: list[Lane] = []
        self._is_delivering = self._is_waking = self._is_closed = False
        self._closing = threading.Lock()
        # Half of what `call_soon_threadsafe` costs, and it is done at every step.
        self._woken, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        contextvars.Context().run(self._loop.add_reader, self._woken, self._wake)
        self._lanes: list[Lane] = []
        self._count = count
        self._turn = 0

    def next(self) -> Lane:
        """Return a lane for a file."""
        self._turn += 1
        if len(self._lanes) < self._count:
            self._lanes.append(Lane(self.answer, self._fill, self._loop, f"workflow lane {len(self._lanes)}"))
            return self._lanes[-1]
        return self._lanes[self._turn % self._count]

    def _fill(self, lane: Lane) -> None:
        if not self._filled and not self._is_delivering:
            self._loop.call_soon(self._start)
        self._filled.append(lane)

    def _start(self) -> None:
        while self._filled:
            self._filled.pop().start()

    def answer(self, then: Then, value: Any, error: BaseException | None) -> None:
        """Call back in the loop's thread, soon. Call from any thread; after the end it is not heard."""
        self._answers.append((then, value, error))
        if not self._is_waking:
            with self._closing:  # a body may end when the pipe's number is another file's
                if not self._is_closed:
                    self._is_waking = True
                    os.write(self._wakes, b"!")

    def _wake(self) -> None:
        os.read(self._woken, 1 << 10)
        self._is_waking = False  # after reading, or its byte is lost; before looking: what is appended from now on wakes again
        self._deliver()

    def _deliver(self) -> None:
        left = len(self._answers)  # not those that come meanwhile, perhaps without end: others want their turn, too
        self._is_delivering = True
        try:
            while left:
                left -= 1
                then, value, error = self._answers.popleft()
                then(value, error)
                self._start()  # not when all are done: their disks work while the others are
        finally:
            self._is_delivering = False
            self._start()
            if left:  # a callback failed: the others' answers come all the same
                self._loop.call_soon(self._deliver)

    async def close(self) -> None:
        """Run what waits, and end the threads."""
        self._start()
        threads = [lane.stop() for lane in self._lanes]
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
        self._loop.call_soon(self._deliver)
        await asyncio.sleep(0)
        self._loop.remove_reader(self._woken)
        with self._closing:
            self._is_closed = True
            os.close(self._woken)
            os.close(self._wakes)


_queues: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Work | None]] = weakref.WeakKeyDictionary()
"""Of all threads of pools."""


def _end_threads() -> None:
    """Let what runs in a pool end before the process does: a body is not cut in its middle."""
    threads = list(_queues.items())
    for _, waiting in threads:
        waiting.put(None)
    for thread, _ in threads:
        thread.join()


atexit.register(_end_threads)


class Pool:
    """Threads for what may take long, whose answers come with those of the lanes.

    An executor of `concurrent.futures` does the same with a future, two locks and a condition for each call, of which nobody here would make use.
    """

    def __init__(self, answer: Answer, loop: asyncio.AbstractEventLoop, count: int, name: str) -> None:
        """`count`: so many threads at most; each is made when it is first needed."""
        self._answer = answer
        self._loop = loop
        self._name = name
        self._count = count
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._idle: deque[None] = deque(maxlen=count)
        """One for each thread that has nothing to do and was promised nothing; when all threads are there it no longer counts."""
        self._threads = 0
        self._is_closed = False

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run something in one of the threads. Call from the loop's thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.give(partial(settle, future), partial(work, *args, **kwargs))
        return future

    def give(self, then: Then, work: Callable[..., object], /, *args: object) -> None:
        """Run something in one of the threads, and call back as `Lane.give` does. Raises `RuntimeError`: the pool takes nothing more, or has no thread."""
        if self._is_closed:
            raise RuntimeError(f"{self._name}: the pool is closed")
        if self._idle:
            self._idle.pop()  # of those that take from it, this thread is the only one
        elif self._threads < self._count:
            self._start_thread()
        self._queue.put((then, work, args))

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name} {self._threads + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives none
            if not self._threads:
                raise
            return  # those that are there come to it
        self._threads += 1
        _queues[thread] = self._queue

    def close(self) -> None:
        """Take nothing more; what runs ends, unheard."""
        self._is_closed = True
        for _ in range(self._threads):
            self._queue.put(None)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            _do(self._free, *work)
            del work  # nothing of a run that has left stays here until the next

    def _free(self, then: Then, value: Any, error: BaseException | None) -> None:
        self._idle.append(None)  # before the answer, which may bring the next
        self._answer(then, value, error)
