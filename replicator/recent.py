"""The bodies of files that were stored lately, so that compaction need not fetch what this process has just sent.

All replicas of a database share one of these: a file of a level and range holds the same everywhere.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from replicator.format.ltx import FileInfo

__all__ = ["RecentFiles"]


class RecentFiles:
    """A bounded store in memory; what is oldest goes first. May be used from several threads."""

    def __init__(self, limit_bytes: int = 16 << 20) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._bodies: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._size = 0

    def add(self, level: int, min_txid: int, max_txid: int, body: bytes) -> None:
        """Keep a body, unless it alone is more than a quarter of the whole."""
        if len(body) > self._limit // 4:
            return
        with self._lock:
            self._size += len(body) - len(self._bodies.pop((level, min_txid, max_txid), b""))
            self._bodies[level, min_txid, max_txid] = body
            while self._size > self._limit:
                self._size -= len(self._bodies.popitem(last=False)[1])

    def get(self, info: FileInfo) -> bytes | None:
        """Return the body of a file, or None."""
        with self._lock:
            return self._bodies.get((info.level, info.min_txid, info.max_txid))
