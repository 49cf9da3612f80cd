"""Which files may go? Pure decisions, no I/O.

* **Raw files** (level 0) that level 1 holds go when they are older than `l0_retention_s`. The walk stops at the first that is too young, so
  that no hole appears, and the newest one always stays: a peer that takes over finds its position by it.
* **Full images** (level 9) go when a later one is older than `snapshot_retention_s`, too: the newest image before the window is the base of
  the window's first moments. (The peer deletes by age alone, and with its defaults keeps next to nothing of the last 24 hours.)
* **Merged files** that end before the last deleted image go with it, and so do raw files that nobody merged. The newest of each level stays. This is the peer's
  floor: one image earlier than necessary, so that a restore somewhere else, which began before the deletion, still finds its files.

`safe_to_delete` is the last word. It looks at what would remain, not at how the choice was made: the newest state, and every state that
the remaining images lead to, must be reachable as before. Where that is not so, or where times are not to be trusted, nothing is deleted.

Source: specification, section 2.3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence

from replicator.errors import NonContiguous
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo
from replicator.levels import Files, History, newest_txid, next_boundary
from replicator.plan import plan_restore

__all__ = ["due_retention", "expired_files", "safe_to_delete", "untrusted_times"]

CLOCK_TOLERANCE_S = 300.0
"""How far ahead of our clock a file's time may be; stores and hosts differ by seconds."""


def expired_raw_files(files: Files, history: History, now: float) -> list[FileInfo]:
    """Return the raw files whose time is over, in order."""
    merged, raw = newest_txid(files.get(1, ())), files.get(0, ())
    if not history.l0_retention_s or not merged:
        return []
    found: list[FileInfo] = []
    for info in raw[:-1]:
        if info.created_at.timestamp() > now - history.l0_retention_s or info.max_txid > merged:
            break
        found.append(info)
    return found


def expired_history(files: Files, history: History, now: float) -> list[FileInfo]:
    """Return the full images and merged files that the window does not need any more."""
    images = files.get(SNAPSHOT_LEVEL, ())
    old = [info for info in images if info.created_at.timestamp() <= now - history.snapshot_retention_s]
    doomed = list(old[:-1])
    if not doomed:
        return []
    floor = doomed[-1].max_txid
    for level in range(0 if history.l0_retention_s else 1, SNAPSHOT_LEVEL):
        doomed += [info for info in files.get(level, ())[:-1] if info.max_txid < floor]
    return doomed


def expired_files(files: Files, history: History, now: float) -> list[FileInfo]:
    """Return all files whose time is over, those of the lowest level first."""
    if not history.retention_enabled:
        return []
    raw = expired_raw_files(files, history, now)
    names = {info.name for info in raw}
    return raw + [info for info in expired_history(files, history, now) if info.level or info.name not in names]


def due_retention(files: Files, history: History, now: float) -> float | None:
    """Return when the next file's time will be over; None when none will without new files. Rounded up to the check interval."""
    if not history.retention_enabled:
        return None
    found: list[float] = []
    merged, raw = newest_txid(files.get(1, ())), files.get(0, ())
    if history.l0_retention_s and len(raw) > 1 and raw[0].max_txid <= merged:
        found.append(raw[0].created_at.timestamp() + history.l0_retention_s)
    images = files.get(SNAPSHOT_LEVEL, ())
    if len(images) > 1:
        found.append(images[1].created_at.timestamp() + history.snapshot_retention_s)
    if not found:
        return None
    return max(now, next_boundary(min(found), history.l0_retention_check_interval_s))


def untrusted_times(files: Files, now: float) -> str:
    """Return why the stored times cannot decide about deletion at `now`, or an empty string."""
    # A file in the middle that is dated wrongly only stops the walk there; what counts is whether time can be told now.
    newest = max((infos[-1] for infos in files.values() if infos), key=lambda info: info.created_at, default=None)
    if newest is not None and newest.created_at.timestamp() > now + CLOCK_TOLERANCE_S:
        return f"file {newest.name} of level {newest.level} is dated {newest.created_at.isoformat()}, in the future: is the clock right?"
    return ""


def safe_to_delete(
    files: Files, doomed: Collection[FileInfo], keep: Collection[tuple[int, int, int]] = (), *, is_sound: bool = False
) -> list[FileInfo]:
    """Return those of `doomed` that nothing needs; none at all when the rest would reach less than before.

    Args:
        keep: (level, min TXID, max TXID) of files that are in use.
        is_sound: the chain was looked at before, and has only changed by what this process did since.

    Raises:
        NonContiguous: the chain has a gap already. Nothing may be deleted before somebody has looked at it.
    """
    going: dict[tuple[int, int, int], FileInfo] = {(info.level, info.min_txid, info.max_txid): info for info in doomed}
    for key in keep:
        going.pop(key, None)
    if not going or (is_sound and _are_merged(list(going.values()), files.get(1, ()))):
        return list(going.values())
    rest = {level: [info for info in infos if (level, info.min_txid, info.max_txid) not in going] for level, infos in files.items()}
    before, after = plan_restore(files)[-1].max_txid, plan_restore(rest)[-1].max_txid
    if before != after:
        raise NonContiguous(after, before)
    for image in rest.get(SNAPSHOT_LEVEL, ()):
        before, after = _reach(files, image), _reach(rest, image)
        if before != after:
            raise NonContiguous(after, before)
    return list(going.values())


def _are_merged(doomed: Sequence[FileInfo], merged: Sequence[FileInfo]) -> bool:
    """True when these are raw files, and level 1 holds every TXID of them: the common case, decided without a plan."""
    if any(info.level for info in doomed):
        return False
    at = max(0, bisect_right(merged, doomed[0].min_txid, key=lambda info: info.min_txid) - 1)
    for info in doomed:
        while at < len(merged) and merged[at].max_txid < info.max_txid:
            at += 1
        if at == len(merged) or merged[at].min_txid > info.min_txid:
            return False
    return True


def _reach(files: Files, image: FileInfo) -> TXID:
    """Return how far merged and raw files lead from a full image."""
    current = image.max_txid
    ranges = sorted((info.min_txid, info.max_txid) for level, infos in files.items() if level != SNAPSHOT_LEVEL for info in infos)
    for low, high in ranges:
        if low > current + 1:
            break
        current = max(current, high)
    return current
