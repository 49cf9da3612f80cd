"""Which snapshots and segments of format 0.3 may go, and when is a snapshot due? Pure decisions, no I/O.

* **Snapshots** go when a later one, of whatever generation, is older than the retention, too: the newest one before the window is the base of the
  window's first moments. (0.3.13 deletes by age alone, and with its defaults keeps next to nothing right after a new snapshot.)
* **Segments** go with an index below that of the base, in its generation: a restore begins with the WAL of the snapshot's own index, from its start.
* **Generations** go whole when their newest file is not newer than the base. The current one stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info
from replicator.levels import History
from replicator.v3chain import Stored

__all__ = ["Expired", "due_snapshot", "due_v3_retention", "expired_v3", "snapshot_every_s", "spare", "untrusted_time"]

CLOCK_TOLERANCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Expired:
    """What may go: single objects in the order in which they must be deleted, and generations as a whole."""

    objects: tuple[V3Info, ...] = ()
    generations: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.objects or self.generations)


def snapshot_every_s(history: History) -> float:
    """Return the time between two snapshots; 0 for none. Where none are asked for, retention needs them."""
    return history.snapshot_interval_s or (history.snapshot_retention_s if history.retention_enabled else 0.0)


def due_snapshot(stored: Stored, generation: str, index: int, history: History) -> float | None:
    """Return when a snapshot is due, in seconds since 1970; None while the newest one is of the current index: one for each is enough."""
    snapshots = _snapshots(stored, generation)
    every_s = snapshot_every_s(history)
    if not snapshots or not every_s or index <= snapshots[-1].index:
        return None
    return snapshots[-1].created_ns / 1e9 + every_s


def expired_v3(stored: Stored, current: str, history: History, now: float) -> Expired:
    """Return what the window does not need any more.

    Args:
        current: the generation that is being written.
        now: seconds since 1970.
    """
    if not history.retention_enabled:
        return Expired()
    edge_ns = int((now - history.snapshot_retention_s) * 1e9)
    old = [info for generation in stored for info in _snapshots(stored, generation) if info.created_ns <= edge_ns]
    if not old:
        return Expired()
    base = max(old, key=lambda info: (info.created_ns, info.index))
    whole = tuple(
        generation
        for generation, infos in stored.items()
        if generation not in (base.generation, current) and infos and max(info.created_ns for info in infos) <= base.created_ns
    )
    infos = stored[base.generation]
    snapshots = [info for info in infos if isinstance(info, SnapshotInfo) and info.index < base.index]
    segments = [info for info in infos if isinstance(info, SegmentInfo) and info.index < base.index]
    return Expired((*snapshots, *sorted(segments, key=lambda info: info.position)), whole)


def spare(expired: Expired, in_use: Mapping[str, int]) -> Expired:
    """Return the same without what restores read: generations, each from an index on."""
    return Expired(
        tuple(info for info in expired.objects if info.index < in_use.get(info.generation, info.index + 1)),
        tuple(generation for generation in expired.generations if generation not in in_use),
    )


def due_v3_retention(stored: Stored, current: str, history: History, now: float) -> float | None:
    """Return when something may go; None when nothing will without new files."""
    if not history.retention_enabled:
        return None
    if expired_v3(stored, current, history, now):
        return now
    times = [info.created_ns / 1e9 + history.snapshot_retention_s for generation in stored for info in _snapshots(stored, generation)]
    return min((when for when in times if when > now), default=None) if len(times) > 1 else None


def untrusted_time(stored: Stored, now: float) -> str:
    """Return why the stored times cannot decide about deletion at `now`, or an empty string."""
    newest = max((info for infos in stored.values() for info in infos), key=lambda info: info.created_ns, default=None)
    if newest is not None and newest.created_ns / 1e9 > now + CLOCK_TOLERANCE_S:
        return f"{newest.name} is dated {newest.created_at.isoformat()}, in the future: is the clock right?"
    return ""


def _snapshots(stored: Stored, generation: str) -> list[SnapshotInfo]:
    found = [info for info in stored.get(generation, ()) if isinstance(info, SnapshotInfo)]
    return sorted(found, key=lambda info: info.index)
