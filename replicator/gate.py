"""How many threads of this process work on databases at once.

A thread that holds SQLite's write lock, for a checkpoint or to move a pin, needs the interpreter a dozen times before it can let go, and writers
wait until then. Among hundreds of threads that want the interpreter, too, each of these times takes long. So whoever reads a WAL, moves a page table,
checkpoints, stores a file in a directory or keeps the history there does so in one of a few places, in the order in which they came. Then too much
work shows as lag (a database is looked at less often, and what was committed meanwhile shares one file) and not as writers that wait.

A place is held while there is something to do, never while a store, a person or another database is waited for. What takes long all the same (a
whole database is read, a disk does not answer, an application keeps its lock) does not count any more after `LATE_S`, so that it keeps nobody out for ever.
Nobody enters, or comes back, with a lock in hand that somebody inside may wait for.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from types import TracebackType

__all__ = ["Gate", "gate"]

PLACES = 2
LATE_S = 0.1

_Turn = tuple[int, threading.Lock]


class Gate:
    """A context manager for any number of threads: `with gate: ...` waits for a place. One thread has one place at a time.

    Attributes:
        first: the same, for what ends something that was begun. It comes before all that would begin something: there is never more of it than that.
    """

    def __init__(self, places: int = PLACES, *, late_s: float = LATE_S) -> None:
        self.first = _First(self)
        self._places, self._late_s = places, late_s
        self._lock = threading.Lock()
        self._inside: dict[int, float] = {}
        """The threads that count, and since when."""
        self._ending: deque[_Turn] = deque()
        self._beginning: deque[_Turn] = deque()

    @property
    def waiting(self) -> int:
        """How many threads wait for a place."""
        return len(self._ending) + len(self._beginning)

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread has a place that counts."""
        return threading.get_ident() in self._inside

    def enter(self, *, first: bool) -> None:
        """Wait for a place. `leave` it in the end."""
        me = threading.get_ident()
        with self._lock:
            assert me not in self._inside, "a thread has one place at a time"
            if len(self._inside) < self._places and not self.waiting:
                self._inside[me] = time.monotonic()
                return
            turn = threading.Lock()
            turn.acquire()
            # If all who are inside and before it take too long, it is its turn by then: of a thousand that wait few wake for nothing.
            patience_s = self._late_s * (1 + self.waiting / self._places)
            queue = self._ending if first else self._beginning
            queue.append((me, turn))
        try:
            while not turn.acquire(timeout=patience_s):
                patience_s = self._late_s
                self._pass_over_late()
        except BaseException:  # an interrupt
            with self._lock:
                if (me, turn) in queue:
                    queue.remove((me, turn))
                else:
                    self._leave(me)
            raise

    def leave(self) -> None:
        """Let the next one in."""
        with self._lock:
            self._leave(threading.get_ident())

    def aside(self) -> _Aside:
        """Return a context manager that gives the place back, for as long as something is waited for; nothing for a thread that has none."""
        return _Aside(self)

    def __enter__(self) -> None:
        self.enter(first=False)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.leave()

    def _leave(self, thread: int) -> None:
        self._inside.pop(thread, None)  # one that was late does not count any more
        self._admit()

    def _admit(self) -> None:
        while len(self._inside) < self._places and (queue := self._ending or self._beginning):
            thread, turn = queue.popleft()
            self._inside[thread] = time.monotonic()
            turn.release()

    def _pass_over_late(self) -> None:
        with self._lock:
            limit = time.monotonic() - self._late_s
            for thread in [thread for thread, began in self._inside.items() if began <= limit]:
                del self._inside[thread]
            self._admit()


class _First:
    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.enter(first=True)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self._gate.leave()


class _Aside:
    __slots__ = ("_gate", "_was_inside")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._was_inside = self._gate.is_inside
        if self._was_inside:
            self._gate.leave()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        if self._was_inside:
            self._gate.enter(first=True)


_shared = Gate()


def gate() -> Gate:
    """Return the gate of this process: what it protects, the interpreter, is one for all."""
    return _shared


def _in_child() -> None:
    global _shared
    _shared = Gate()  # who was inside is not there any more


os.register_at_fork(after_in_child=_in_child)
