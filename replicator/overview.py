"""What every database is doing, in one answer that is cheap to make for ten thousand of them: behind `pyrepl top`.

One row for each database, as plain values for JSON. What is zero or empty is left out, so that a database at rest is its path, its state and its
TXID. Counters count since the database last began to be replicated; who asks twice makes rates of them, by `uptime_seconds` of the same answers.
"""

from __future__ import annotations

import os
import time
from typing import Any

from replicator import __version__
from replicator.storage.measured import Operations
from replicator.store import Member, Store

__all__ = ["Overview", "row"]


class Overview:
    """Makes the answers. `operations`: those of all databases."""

    def __init__(self, store: Store, operations: Operations) -> None:
        self._store, self._operations = store, operations
        self._began = time.monotonic()

    def answer(self) -> dict[str, Any]:
        """Return what is going on now, without waiting for anything."""
        kinds: dict[str, dict[str, int]] = {}
        for (_, kind), item in self._operations.kinds().items():
            counted = kinds.setdefault(kind, {"requests": 0, "bytes": 0, "errors": 0})
            counted["requests"] += item.count
            counted["bytes"] += item.size_bytes
            counted["errors"] += sum(item.errors.values())
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._began, 6),
            "resident_bytes": _resident_bytes(),
            "operations": kinds,
            "databases": [row(member) for member in self._store.members()],
        }


def row(member: Member) -> dict[str, Any]:
    """Describe one database. Figures of several replicas: the worst one's for what is a time, the sum for what is a count."""
    replicator = member.replicator
    if replicator is None:
        return _without_nothing(path=str(member.path), state=member.state, txid=member.txid, error=member.problem)
    status = replicator.status()
    replicas = status.replicas
    entries, memory, staged = status.waiting
    error = status.error or next((f"{item.url}: {item.error}" for item in replicas if item.error), None)
    return _without_nothing(
        path=str(member.path),
        state={"starting": "waiting"}.get(status.state, status.state),
        txid=status.txid,
        position=status.position,
        lag_s=round(max((item.lag_s for item in replicas), default=0.0), 6),
        loss_p50_s=round(max((item.loss_window.p50_s for item in replicas), default=0.0), 6),
        loss_p99_s=round(max((item.loss_window.p99_s for item in replicas), default=0.0), 6),
        loss_max_s=round(max((item.loss_window.max_s for item in replicas), default=0.0), 6),
        wal_bytes=status.wal_size_bytes,
        pinned_s=round(status.pinned_s, 6),
        pending=entries,
        pending_bytes=memory + staged,
        syncs=status.counts.syncs,
        requests=member.requests,
        sent_bytes=sum(item.bytes_sent for item in replicas),
        errors=status.counts.sync_errors + sum(item.retries for item in replicas),
        error=error or next((f"{item.url}: {item.problems[0]}" for item in replicas if item.problems), None),
    )


def _without_nothing(**fields: object) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0  # not on Linux: nobody knows
