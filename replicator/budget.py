"""A bound for memory that many databases share: files that are being made, or that wait for a replica.

Each of them may hold a file of up to 8 MiB in memory. A thousand that write much at once must not hold a thousand of these: what the budget has
no room for goes through the disk, where it would go anyway if it were larger. So nobody waits for room, and a database whose replica does
not answer takes nothing from the others but speed.
"""

from __future__ import annotations

import threading
import weakref

__all__ = ["MemoryBudget"]


class MemoryBudget:
    """So many bytes. May be used from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.RLock()  # the collector of garbage may call `give` in the midst of `take`
        self._held = 0

    @property
    def held_bytes(self) -> int:
        return self._held

    def take(self, size: int) -> bool:
        """Take bytes, if there are as many left."""
        with self._lock:
            if self._held + size > self.limit_bytes:
                return False
            self._held += size
            return True

    def give(self, size: int) -> None:
        """Give bytes back."""
        with self._lock:
            self._held -= size

    def give_with(self, holder: object, size: int) -> None:
        """Give bytes back when nobody has `holder` any more."""
        if size:
            weakref.finalize(holder, self.give, size).atexit = False
