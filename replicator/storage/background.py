"""An event loop in a thread, for clients whose libraries are asynchronous. All of them share one; it ends with the last of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import ClassVar, TypeVar

__all__ = ["Background"]

T = TypeVar("T")

_GRACE_S = 5.0


class Background:
    """A user of the shared loop, from `__init__` to `close`. May be used from any thread but the loop's own."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _users: ClassVar[int] = 0
    _loop: ClassVar[asyncio.AbstractEventLoop | None] = None
    _thread: ClassVar[threading.Thread | None] = None

    def __init__(self) -> None:
        with self._lock:
            if Background._loop is None:
                loop = asyncio.new_event_loop()
                # A daemon: a client that nobody closed must not keep the process from ending.
                thread = threading.Thread(target=loop.run_forever, name="pyrepl storage", daemon=True)
                thread.start()
                Background._loop, Background._thread = loop, thread
            Background._users += 1
            self._own = Background._loop
        self.closed = False

    def run(self, work: Coroutine[object, object, T], *, timeout_s: float) -> T:
        """Carry out a coroutine and return its result.

        Raises:
            TimeoutError: it took longer; it is cancelled then.
            ConnectionError: the library cancelled it, as some do when a connection ends.
        """
        if self.closed:
            work.close()
            raise RuntimeError("client is closed")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._own)
        try:
            return future.result(timeout_s + _GRACE_S)
        except concurrent.futures.CancelledError:
            raise ConnectionError("cancelled") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Leave the loop; the last one ends it. Closing twice does nothing."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            Background._users -= 1
            if Background._users:
                return
            loop, thread = Background._loop, Background._thread
            Background._loop = Background._thread = None
        if loop is None or thread is None:
            return
        with contextlib.suppress(concurrent.futures.TimeoutError, TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(_GRACE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_GRACE_S)
        if not thread.is_alive():
            loop.close()


async def _cancel_all() -> None:
    """End what libraries left running, so that nothing is destroyed while it waits."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
