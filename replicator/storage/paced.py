"""A client whose uploads share a rate with others: not more than so many a second, whoever makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import Body, Comparing, ReplicaClient
from replicator.storage.measured import Measured, MeasuredComparing, Operations

__all__ = ["Pace", "paced"]


class Pace:
    """Turns, evenly spaced, with room for a burst of a second's worth. May be used from any thread."""

    def __init__(self, per_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._step, self._clock, self._sleep = 1.0 / per_s, clock, sleep
        self._lock = threading.Lock()
        self._next = clock()

    def wait(self) -> None:
        """Return when it is this caller's turn."""
        with self._lock:
            now = self._clock()
            self._next = max(self._next, now - 1.0) + self._step
            delay = self._next - now
        if delay > 0:
            self._sleep(delay)


def paced(client: ReplicaClient, operations: Operations, pace: Pace | None) -> ReplicaClient:
    """Return a client that does the same, counts, and waits for its turn before each upload; without a pace it only counts."""
    if pace is None:
        return MeasuredComparing(client, operations) if isinstance(client, Comparing) else Measured(client, operations)
    return _PacedComparing(client, operations, pace) if isinstance(client, Comparing) else _Paced(client, operations, pace)


class _Paced(Measured):
    def __init__(self, inner: ReplicaClient, operations: Operations, pace: Pace) -> None:
        super().__init__(inner, operations)
        self._pace = pace

    def put(
        self,
        level: int,
        min_txid: TXID,
        max_txid: TXID,
        body: Body,
        *,
        timestamp_ms: int,
        if_absent: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> FileInfo:
        self._pace.wait()
        return super().put(level, min_txid, max_txid, body, timestamp_ms=timestamp_ms, if_absent=if_absent, metadata=metadata)


class _PacedComparing(_Paced, MeasuredComparing):
    pass
