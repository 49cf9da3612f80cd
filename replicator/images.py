"""Full images of the newest state, encoded once for all replicas that want one at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replicator.format.ltx import TXID
from replicator.outbox import OutFile

__all__ = ["Images"]


@dataclass(slots=True, eq=False)
class _Shared:
    out: OutFile
    users: int = 0


class Images:
    """May be used from several threads; who comes while an image is made waits for it and shares it."""

    def __init__(self, make: Callable[[], OutFile]) -> None:
        """`make` encodes an image of the newest state; what it returns belongs to this object."""
        self._make = make
        self._lock = threading.Lock()
        self._current: _Shared | None = None

    @contextlib.contextmanager
    def take(self, at_least: TXID) -> Iterator[OutFile]:
        """Give an image of a TXID that is not older than `at_least`. The file is there until the last user has left the block."""
        with self._lock:
            if self._current is None or self._current.out.max_txid < at_least:
                self._current = _Shared(self._make())
            image = self._current
            image.users += 1
        try:
            yield image.out
        finally:
            with self._lock:
                image.users -= 1
                if not image.users:
                    if image is self._current:
                        self._current = None
                    image.out.discard()
