"""Records of parked databases on the disk, and a look at a database's files from outside. What it means is decided in `parking.py`.

The database file is only ever looked at by `stat`: closing a descriptor of it would drop the locks of whoever else has it open in this process.
"""

from __future__ import annotations

import contextlib
import os
import stat
from functools import cache
from pathlib import Path

from replicator.atomic import write_file
from replicator.errors import FormatError
from replicator.format.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE, decode_frame_header, decode_wal_header, frame_size
from replicator.parking import Fields, FileMark, Parked, Sight, WALEnd, decode, encode, packed
from replicator.tail import WALPosition

__all__ = ["boot_id", "forget", "glance", "look", "read_record", "wal_end", "write_record"]

MAX_RECORD = 1 << 16
_NAME = "parked.json"


def look(path: Path) -> Sight:
    """Return what stands at the names of a database now."""
    name = os.fspath(path)
    return Sight(_mark(name), _mark(name + "-wal"), os.path.lexists(name + "-journal"))


def glance(path: Path) -> bytes:
    """Return what `look` does, packed."""
    name = os.fspath(path)
    return packed(_fields(name), _fields(name + "-wal"), has_journal=os.path.lexists(name + "-journal"))


def _mark(name: str) -> FileMark | None:
    found = _fields(name)
    return FileMark(*found[1:]) if found is not None else None


def _fields(name: str) -> Fields | None:
    try:
        found = os.stat(name)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return True, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def wal_end(path: Path, position: WALPosition, page_size: int) -> WALEnd:
    """Return what the WAL of a database holds around a position. The `-wal` file carries no locks."""
    try:
        file = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return WALEnd(None, None, None)
    try:
        header = None
        with contextlib.suppress(FormatError):
            header = decode_wal_header(os.pread(file, WAL_HEADER_SIZE, 0))
        at = position.offset - frame_size(page_size)
        frames = [os.pread(file, FRAME_HEADER_SIZE, offset) if offset >= WAL_HEADER_SIZE else b"" for offset in (at, position.offset)]
        last, following = (decode_frame_header(data) if len(data) == FRAME_HEADER_SIZE else None for data in frames)
        return WALEnd(header, last, following)
    finally:
        os.close(file)


@cache
def boot_id() -> str:
    """Return a name for this run of the system; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_record(folder: Path) -> Parked | None:
    """Return the record in a folder for local state (`<meta>/pyrepl`); None when there is none that can be read."""
    try:
        file = os.open(folder / _NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return decode(os.read(file, MAX_RECORD))
    except (OSError, FormatError):
        return None
    finally:
        os.close(file)


def write_record(folder: Path, record: Parked) -> None:
    """Put a record there durably. Raises `OSError`."""
    write_file(folder / _NAME, encode(record))


def forget(folder: Path) -> None:
    """Remove the record. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / _NAME)
