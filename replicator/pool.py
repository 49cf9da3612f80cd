"""A few threads for jobs of many databases. A job that hangs holds up nobody: after a while it does not count any more."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Pool"]

STUCK_S = 2.0
LINGER_S = 5.0

log = logging.getLogger(__name__)


class Pool:
    """Threads that are started when they are needed, and end when they are not. May be used from any thread."""

    def __init__(self, name: str, *, at_once: int, most: int = 512, stuck_s: float = STUCK_S) -> None:
        """
        Args:
            at_once: jobs side by side, those not counted that take longer than `stuck_s`.
            most: threads, whatever happens.
        """
        self._name, self._at_once, self._most, self._stuck_s = name, at_once, most, stuck_s
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._began: dict[int, float] = {}
        self._idle = 0
        self._next = 0
        self._threads: set[threading.Thread] = set()
        self._is_dismissed = False

    def room(self) -> int:
        """Return how many jobs can begin at once."""
        with self._changed:
            late = time.monotonic() - self._stuck_s
            stuck = sum(began < late for began in self._began.values())
            working = len(self._began) + len(self._jobs)
            return min(self._at_once - (working - stuck), self._most - working)

    def recheck_s(self) -> float:
        """Return how long it takes at most until a job counts as stuck, while there is no room."""
        return self._stuck_s / 4

    def submit(self, job: Callable[[], None]) -> None:
        """Let a thread do a job. Raises `RuntimeError`: the system has no more threads; the job is not done then."""
        with self._changed:
            self._is_dismissed = False
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
                return
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._jobs.remove(job)
                raise
            self._threads.add(thread)

    def dismiss(self, timeout_s: float) -> None:
        """Let the threads end as soon as they have nothing to do, not after a while, and wait for that; until the next job."""
        with self._changed:
            self._is_dismissed = True
            threads = list(self._threads)
            self._changed.notify_all()
        end = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        with self._changed:
            self._next += 1
            mine = self._next
        while True:
            with self._changed:
                if not self._jobs:
                    self._idle += 1
                    self._changed.wait_for(lambda: self._jobs or self._is_dismissed, LINGER_S)
                    self._idle -= 1
                if not self._jobs:
                    self._threads.discard(threading.current_thread())
                    return
                job = self._jobs.popleft()
                self._began[mine] = time.monotonic()
            try:
                job()
            except Exception as error:
                log.error("a job failed, by a defect", exc_info=error)
            finally:
                with self._changed, contextlib.suppress(KeyError):
                    del self._began[mine]
