"""Which compactions and snapshots are due, and from which files? Pure decisions, no I/O.

Level 0 holds one file for each sync, level 9 full images. Between them each level holds merged files of the level below: level 1 those of
half a minute, level 2 of five minutes, level 3 of an hour, unless told otherwise. A level's due times are the multiples of its interval,
counted from the year 1 (so that the boundaries are the peer's, also for intervals that do not divide a day).

Source: specification, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.errors import ConfigError
from replicator.format.ltx import SNAPSHOT_LEVEL

__all__ = ["History", "next_boundary", "previous_boundary"]

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
