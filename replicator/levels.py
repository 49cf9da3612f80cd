"""Which compactions and snapshots are due, and from which files? Pure decisions, no I/O.

Level 0 holds one file for each sync, level 9 full images. Between them each level holds merged files of the level below: level 1 those of
half a minute, level 2 of five minutes, level 3 of an hour, unless told otherwise. A level's due times are the multiples of its interval,
counted from the year 1 (so that the boundaries are the peer's, also for intervals that do not divide a day).

Source: specification, section 2.2.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replicator.errors import ConfigError
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo

__all__ = [
    "Compact",
    "Files",
    "History",
    "compaction_inputs",
    "due_compactions",
    "due_snapshot",
    "newest_txid",
    "next_boundary",
    "previous_boundary",
]

YEAR_ONE_S = 62135596800
"""Seconds from 0001-01-01T00:00:00Z to 1970-01-01T00:00:00Z."""


@dataclass(frozen=True, slots=True)
class History:
    """How much of the past a replica keeps, and how finely. Seconds throughout; the defaults are the peer's.

    Attributes:
        level_intervals_s: one for each of the levels 1, 2, ... (`levels:` of the configuration).
        snapshot_interval_s: time between full images; 0 for none but the necessary ones.
        snapshot_retention_s: age at which a full image may go; every moment younger than that stays restorable.
        l0_retention_s: age at which a raw file that level 1 holds may go; 0 keeps them for ever.
        l0_retention_check_interval_s: time between two looks at the raw files.
        retention_enabled: False deletes nothing on the replica: the bucket's lifecycle rules do.

    Raises:
        ConfigError: by the constructor, for values that cannot work.
    """

    level_intervals_s: tuple[float, ...] = (30.0, 300.0, 3600.0)
    snapshot_interval_s: float = 86400.0
    snapshot_retention_s: float = 86400.0
    l0_retention_s: float = 300.0
    l0_retention_check_interval_s: float = 15.0
    retention_enabled: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.level_intervals_s) < SNAPSHOT_LEVEL:
            raise ConfigError(f"levels must have 1 to {SNAPSHOT_LEVEL - 1} entries, not {len(self.level_intervals_s)}")
        if min(self.level_intervals_s) <= 0:
            raise ConfigError("levels: every interval must be longer than 0")
        if self.snapshot_interval_s < 0 or self.l0_retention_s < 0:
            raise ConfigError("snapshot interval and l0-retention cannot be negative")
        if self.snapshot_retention_s <= 0 or self.l0_retention_check_interval_s <= 0:
            raise ConfigError("snapshot retention and l0-retention-check-interval must be longer than 0")


def previous_boundary(now: float, interval_s: float) -> float:
    """Return the last multiple of the interval at or before `now` (both in seconds since 1970)."""
    return (now + YEAR_ONE_S) // interval_s * interval_s - YEAR_ONE_S


def next_boundary(now: float, interval_s: float) -> float:
    """Return the first multiple of the interval after `now`."""
    return previous_boundary(now, interval_s) + interval_s


Files = Mapping[int, Sequence[FileInfo]]
"""What a replica holds: the files of each level in ascending order."""


@dataclass(frozen=True, slots=True)
class Compact:
    """Merge `inputs`, files of the level below that follow each other, into one file of `level`."""

    level: int
    inputs: tuple[FileInfo, ...]


def newest_txid(infos: Sequence[FileInfo]) -> TXID:
    """Return the last TXID of a level; 0 for an empty one. (Where files overlap, which they should not, it may be less than the largest.)"""
    return infos[-1].max_txid if infos else TXID(0)


def due_compactions(files: Files, history: History, now: float) -> list[tuple[float, Compact]]:
    """Return for each level that lacks something of the level below when to merge it, and what; in ascending order of levels.

    A file is due for merging at the first boundary after it was made, as with the peer; one that is dated in the future (a clock was set
    back) at once.

    Args:
        now: seconds since 1970.
    """
    found: list[tuple[float, Compact]] = []
    for level, interval in enumerate(history.level_intervals_s, start=1):
        inputs = compaction_inputs(files.get(level - 1, ()), files.get(level, ()))
        if inputs:
            found.append((_due(inputs[0], interval, now), Compact(level, inputs)))
    return found


def compaction_inputs(sources: Sequence[FileInfo], merged: Sequence[FileInfo]) -> tuple[FileInfo, ...]:
    """Return the files of a level that the level above lacks, up to the first gap."""
    have = newest_txid(merged)
    inputs: list[FileInfo] = []
    for info in sources[bisect_right(sources, have, key=lambda info: info.min_txid) :]:
        if inputs and info.max_txid <= inputs[-1].max_txid:
            continue  # lies inside the one before
        if inputs and info.min_txid > inputs[-1].max_txid + 1:
            break
        inputs.append(info)
    return tuple(inputs)


def due_snapshot(files: Files, history: History, now: float, *, head: TXID) -> float | None:
    """Return when the next full image is due; None when the newest one holds everything already.

    The first file of a history is a full image, too: an image of level 9 follows at the first boundary after it.
    """
    snapshots = files.get(SNAPSHOT_LEVEL, ())
    if not history.snapshot_interval_s or not head or newest_txid(snapshots) >= head:
        return None
    images = snapshots[-1:] or [infos[0] for infos in files.values() if infos and infos[0].min_txid == 1]
    if not images:
        return now
    base = min(images, key=lambda info: info.created_at)
    return _due(base, history.snapshot_interval_s, now)


def _due(info: FileInfo, interval_s: float, now: float) -> float:
    made = info.created_at.timestamp()
    return next_boundary(made, interval_s) if made <= now else now
