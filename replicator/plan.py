"""Which files restore a TXID, a time, or the newest state? A pure decision, no I/O.

The rules are the peer's, so that both engines choose the same state:

1. The newest snapshot (level 9) that is not past the target is the base; there may be none.
2. Then, from TXID `cur` on, each of the levels 8 to 0 offers the file that starts at or before `cur + 1` and reaches furthest. The best
   offer has the larger max TXID, then the smaller min TXID, then the higher level, then the earlier time. It is taken; repeat.
3. Without a target, files that begin after a gap are an error. With a target the gap ends the plan.

A copy that is followed starts from its own TXID instead of a snapshot. Where no file continues it, the newest full image does.

A time excludes files of exactly that time (`<`, not `<=`); a TXID must be the end of a file.

Source: specification, section 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from replicator.errors import NonContiguous, TXIDNotAvailable
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo, format_txid

__all__ = ["chain_end", "plan_follow", "plan_restore"]

Files = Mapping[int, Sequence[FileInfo]]


def plan_restore(files: Files, *, txid: TXID | None = None, timestamp: datetime | None = None) -> list[FileInfo]:
    """Return the files to apply, in order.

    Args:
        files: all stored files by level, each level in ascending order.
        txid: restore exactly this state.
        timestamp: restore the last state strictly before this time.

    Raises:
        TXIDNotAvailable: no chain of files ends there.
        NonContiguous: neither is given, and files follow after a gap.
    """
    if txid is not None and timestamp is not None:
        raise ValueError("txid and timestamp exclude each other")
    plan: list[FileInfo] = []
    for info in files.get(SNAPSHOT_LEVEL, ()):
        if (txid is None or info.max_txid <= txid) and (timestamp is None or info.created_at < timestamp):
            plan = [info]
    current = plan[0].max_txid if plan else TXID(0)
    cursors = [_Cursor(files.get(level, ()), txid, timestamp) for level in range(SNAPSHOT_LEVEL - 1, -1, -1)]
    while (txid is None or current < txid) and (best := _best_offer(cursors, current)) is not None:
        plan.append(best)
        current = best.max_txid
    if txid is None and timestamp is None:
        beyond = [cursor.next_min for cursor in cursors if cursor.next_min is not None]
        if beyond:
            raise NonContiguous(current, min(beyond))
    if not plan or (txid is not None and current < txid):
        raise TXIDNotAvailable(txid or 0, available=_range(files))
    return plan


def plan_follow(files: Files, current: TXID, *, image_of: TXID | None = None) -> list[FileInfo]:
    """Return the files that lead from the state `current` to the newest, in order; none when it is the newest.

    Args:
        files: all stored files by level, each level in ascending order.
        image_of: begin with a full image of this TXID or a later one: no other file can be applied.

    Raises:
        NonContiguous: newer files are stored, and no file leads to them.
    """
    cursors = [_Cursor(files.get(level, ()), None, None) for level in range(SNAPSHOT_LEVEL - 1, -1, -1)]
    images = [info for level in files.values() for info in level if info.min_txid == 1]
    newest = max(images, key=lambda info: info.max_txid, default=None)
    plan: list[FileInfo] = []
    if image_of is not None:
        if newest is None or newest.max_txid < image_of:
            raise NonContiguous(current, image_of)
        plan, current = [newest], newest.max_txid
    while True:
        best = _best_offer(cursors, current)
        if best is None and newest is not None and newest.max_txid > current:
            best = newest
        if best is None:
            break
        # A full image makes everything before it superfluous.
        plan = [*(plan if best.min_txid != 1 else ()), best]
        current = best.max_txid
    beyond = [cursor.next_min for cursor in cursors if cursor.next_min is not None]
    if not plan and beyond:
        raise NonContiguous(current, min(beyond))
    return plan


def chain_end(files: Files) -> TXID:
    """Return the newest TXID that can be restored; 0 when nothing is stored. Raises `NonContiguous` when files follow after a gap."""
    return plan_restore(files)[-1].max_txid if any(files.values()) else TXID(0)


def _best_offer(cursors: Sequence[_Cursor], current: TXID) -> FileInfo | None:
    offers = [offer for cursor in cursors if (offer := cursor.offer(current)) is not None]
    return min(offers, key=lambda info: (-info.max_txid, info.min_txid, -info.level, info.created_at), default=None)


class _Cursor:
    """The files of one level, read once from the front."""

    def __init__(self, files: Sequence[FileInfo], txid: TXID | None, timestamp: datetime | None) -> None:
        self._files, self._txid, self._timestamp = files, txid, timestamp
        self._at = 0
        self._best: FileInfo | None = None

    @property
    def next_min(self) -> TXID | None:
        """Where the next file starts that was out of reach; None at the end."""
        return self._files[self._at].min_txid if self._at < len(self._files) else None

    def offer(self, current: TXID) -> FileInfo | None:
        while self._at < len(self._files) and self._files[self._at].min_txid <= current + 1:
            info = self._files[self._at]
            self._at += 1
            if info.max_txid <= current or (self._txid is not None and info.max_txid > self._txid):
                continue
            if self._timestamp is not None and info.created_at >= self._timestamp:
                continue
            if self._best is None or info.max_txid > self._best.max_txid:
                self._best = info
        if self._best is not None and self._best.max_txid <= current:
            self._best = None
        return self._best


def _range(files: Files) -> str:
    stored = [info for level in files.values() for info in level]
    if not stored:
        return ""
    return f"{format_txid(min(info.min_txid for info in stored))} - {format_txid(max(info.max_txid for info in stored))}"
