"""Has a parked database changed? Decided without opening it, by what was written down when it was closed.

A parked database is one that is stored on all its replicas and that nobody in this process has open. Its *record* (`<meta>/pyrepl/parked.json`) says
what its files looked like then, and where its WAL ended. A commit while it is parked cannot hide from the comparison:

| what happens | what it leaves |
|---|---|
| a commit that goes on in the WAL | a frame with the WAL's salts behind the recorded end |
| a commit that restarts the WAL (after a checkpoint) | other salts in the WAL's header, which SQLite syncs before it writes a page to the database |
| the WAL is truncated, deleted or replaced | another size, inode, or none |
| the database is written without a WAL, copied over or replaced | another inode, size or change time; a rollback journal while it is under way |

The first two rows are content, and hold whatever the clocks and the disk did. The last two rest on the inode's number, size and times, and the
times have a grain: a write within the same tick as the one before leaves no trace in them. So a record counts only when the files had been left
alone for `RACY_NS` when it was made (git has the same rule for its index). And a power cut may keep a write and lose its
time: where there is no WAL whose content could prove the rest, a record of an earlier boot of the machine does not count.

What does not count is no error: the database is opened then, and the engine finds out by the WAL's content or by comparing pages.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from replicator.errors import FormatError
from replicator.format.ltx import TXID
from replicator.format.wal import WAL_HEADER_SIZE, FrameHeader, WALHeader
from replicator.tail import WALPosition

__all__ = ["RACY_NS", "FileMark", "Kept", "Parked", "Sight", "WALEnd", "changed", "decode", "encode", "is_settled", "packed", "wal_moved"]

RACY_NS = 2_000_000_000
"""The coarsest times of a file system that SQLite's locks work on: those of FAT, two seconds."""

VERSION = 1
_SIGHT = struct.Struct("<?3Q2q?3Q2q?")
_NONE = (False, 0, 0, 0, 0, 0)

Fields = tuple[bool, int, int, int, int, int]
"""Whether a file is there, and what a `FileMark` says of it."""


@dataclass(frozen=True, slots=True)
class FileMark:
    """What `stat` says of a file. Times in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Sight:
    """What the names of a database show from outside. None: nothing stands there."""

    database: FileMark | None
    wal: FileMark | None
    has_journal: bool = False

    @property
    def newest_ns(self) -> int:
        """The latest time in it."""
        return max((time for mark in (self.database, self.wal) if mark for time in (mark.mtime_ns, mark.ctime_ns)), default=0)

    def packed(self) -> bytes:
        """Return all of it in a tenth of the memory, for comparing."""
        database, wal = ((True, m.device, m.inode, m.size, m.mtime_ns, m.ctime_ns) if m else None for m in (self.database, self.wal))
        return packed(database, wal, has_journal=self.has_journal)


def packed(database: Fields | None, wal: Fields | None, *, has_journal: bool) -> bytes:
    """Return a packed `Sight` without making one, for those who look at ten thousand a minute."""
    return _SIGHT.pack(*(database or _NONE), *(wal or _NONE), has_journal)


@dataclass(frozen=True, slots=True)
class WALEnd:
    """What the WAL holds: its header, the header of the frame that ended at the recorded place, and of what follows it."""

    header: WALHeader | None
    last: FrameHeader | None
    following: FrameHeader | None


@dataclass(frozen=True, slots=True)
class Parked:
    """The record.

    Attributes:
        sight: the files, when everything in them was stored.
        position: where the WAL ended then.
        page_size: in bytes.
        taken_ns: when the record was made, since 1970.
        boot: names the run of the machine's system; empty where it has no name.
        urls: of the replicas that have it all.
        history_due: when something of the history is due, in seconds since 1970; None for never.
        problems: of the history, for people.
    """

    txid: TXID
    sight: Sight
    position: WALPosition
    page_size: int
    taken_ns: int
    boot: str
    urls: tuple[str, ...]
    history_due: float | None = None
    problems: tuple[str, ...] = ()

    def kept(self) -> Kept:
        """Return what stays in memory."""
        return Kept(self.sight.packed(), self.history_due, self.problems)


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a record a process keeps in memory, where there may be ten thousand: the packed sight, and what is known of the history."""

    sight: bytes
    history_due: float | None
    problems: tuple[str, ...]


def is_settled(sight: Sight, now_ns: int) -> bool:
    """True when the files have been left alone for so long that the next write must show in their times."""
    return now_ns - sight.newest_ns >= RACY_NS


def wal_moved(position: WALPosition, end: WALEnd) -> str:
    """Return why the WAL does not end at a position any more; an empty string when its content proves that it does."""
    if not position.has_wal:
        return "there was no WAL to compare with" if end.header is None else "a WAL has appeared"
    if end.header is None or (end.header.salt1, end.header.salt2) != position.salts:
        return "the WAL was restarted"
    if position.offset > WAL_HEADER_SIZE:
        last = end.last
        if last is None or (last.salt1, last.salt2) != position.salts or (last.checksum1, last.checksum2) != position.checksum:
            return "the WAL was overwritten"
    if end.following is not None and (end.following.salt1, end.following.salt2) == position.salts:
        return "the WAL has grown"
    return ""


def changed(record: Parked, sight: Sight, end: WALEnd, *, boot: str) -> str:
    """Return why a database may have changed since the record was made; an empty string when it has not."""
    if sight.database is None:
        return "the database is not there"
    if sight.has_journal:
        return "there is a rollback journal"
    if sight.database != record.sight.database:
        return "the database file was touched"
    if sight.wal != record.sight.wal:
        return "the WAL was touched"
    if not is_settled(record.sight, record.taken_ns):
        return "the record was made too soon"
    if not record.position.has_wal and end.header is None:
        return "" if boot and boot == record.boot else "the system was started anew, and there is no WAL to prove anything"
    return wal_moved(record.position, end)


# -- the file --------------------------------------------------------------------------------------------------------------------


def encode(record: Parked) -> bytes:
    """Return the bytes of a record: JSON, one object."""
    body: dict[str, object] = {
        "version": VERSION,
        "txid": record.txid,
        "database": _mark_fields(record.sight.database),
        "wal": _mark_fields(record.sight.wal),
        "position": [*record.position.salts, record.position.offset, *record.position.checksum],
        "page_size": record.page_size,
        "taken_ns": record.taken_ns,
        "boot": record.boot,
        "urls": list(record.urls),
        "history_due": record.history_due,
        "problems": list(record.problems),
    }
    return json.dumps(body).encode() + b"\n"


def decode(data: bytes) -> Parked:
    """Read a record. Raises `FormatError` for what is none, or one of another version."""
    try:
        body: Mapping[str, Any] = json.loads(data)
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}")
        salt1, salt2, offset, sum1, sum2 = map(int, body["position"])
        due = body["history_due"]
        return Parked(
            txid=TXID(int(body["txid"])),
            sight=Sight(_mark(body["database"]), _mark(body["wal"])),
            position=WALPosition((salt1, salt2), offset, (sum1, sum2)),
            page_size=int(body["page_size"]),
            taken_ns=int(body["taken_ns"]),
            boot=sys.intern(str(body["boot"])),  # of ten thousand records it is the same
            urls=tuple(map(str, body["urls"])),
            history_due=None if due is None else float(due),
            problems=tuple(map(str, body["problems"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"not a record of a parked database: {error}") from error


def _mark_fields(mark: FileMark | None) -> list[int] | None:
    return None if mark is None else [mark.device, mark.inode, mark.size, mark.mtime_ns, mark.ctime_ns]


def _mark(fields: Sequence[object] | None) -> FileMark | None:
    if fields is None:
        return None
    device, inode, size, mtime_ns, ctime_ns = (int(str(field)) for field in fields)
    return FileMark(device, inode, size, mtime_ns, ctime_ns)
