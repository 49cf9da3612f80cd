"""The one place that opens live database files.

Closing any descriptor of a database file drops all POSIX locks that the process holds on it, SQLite's included: another process could
then checkpoint or restart the WAL under a reader of this one. So a file is opened once for each inode, read-only, and its descriptor
stays open for the life of the process: the application's own connections in it may hold locks at any time. Only a process that has no other
connections than those of its engines may close it, with `close_unused`, once the engine has closed all of its own. The `-shm` file, which carries the WAL's locks, is never opened here at all.

Source: SQLite, "How To Corrupt An SQLite Database File", section 2.2.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path

__all__ = ["Identity", "acquire", "close_unused", "descriptor", "peek", "release", "warn_about_second_library"]

Identity = tuple[int, int]
"""Device and inode."""

_lock = threading.Lock()
_descriptors: dict[Identity, int] = {}
_users: dict[Identity, int] = {}


def descriptor(path: Path) -> int:
    """Return a read-only descriptor of the file that stands at `path` now. It belongs to this module.

    Raises:
        OSError: as `os.open` does.
    """
    with _lock:
        return _descriptors[_open(path)]


def acquire(path: Path) -> tuple[int, Identity]:
    """Return a descriptor as `descriptor` does, and take part in its use: before the first SQLite connection is opened.

    Raises:
        OSError: as `os.open` does.
    """
    with _lock:
        key = _open(path)
        _users[key] = _users.get(key, 0) + 1
        return _descriptors[key], key


def release(key: Identity) -> None:
    """End a part in its use: after the last SQLite connection was closed. The descriptor stays open."""
    with _lock:
        _users[key] -= 1
        if not _users[key]:
            del _users[key]


def peek(path: Path, size: int) -> bytes:
    """Return the first bytes of a file. One that is in use is not closed by that.

    Raises:
        OSError: as `os.open` does.
    """
    with _lock:
        found = os.stat(path)
        if (file := _descriptors.get((found.st_dev, found.st_ino), -1)) >= 0:
            return os.pread(file, size, 0)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # whatever it is, opening it must not wait
        try:
            opened = os.fstat(file)
        except OSError:
            _strays.append(file)
            raise
        if (opened.st_dev, opened.st_ino) in _descriptors:
            _strays.append(file)
            return os.pread(file, size, 0)
        try:
            return os.read(file, size)
        finally:
            os.close(file)


def close_unused(key: Identity) -> bool:
    """Close the descriptor, if nobody takes part in its use. True when it is closed now.

    Only for a process that has no connections to the database but those of engines. Whoever comes at this moment waits, and opens it anew.
    """
    with _lock:
        if key in _users:
            return False
        file = _descriptors.pop(key, -1)
        if file >= 0:
            os.close(file)
        return True


def _open(path: Path) -> Identity:
    found = os.stat(path)
    key = (found.st_dev, found.st_ino)
    if key in _descriptors:
        return key
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        opened = os.fstat(file)
    except OSError:
        _strays.append(file)  # which file it is nobody knows, so closing it might drop locks
        raise
    # The file may have been replaced between the two calls; what was opened is what counts.
    key = (opened.st_dev, opened.st_ino)
    if _descriptors.setdefault(key, file) != file:
        _strays.append(file)  # the same file as one that is open already; closing it would drop its locks
    return key


_strays: list[int] = []


def warn_about_second_library() -> None:
    """Warn when another copy of the SQLite library is loaded: closing a file there drops the locks of this one, too."""
    loaded = [name for name in ("pysqlite3", "apsw", "sqlcipher3") if name in sys.modules]
    if loaded:
        warnings.warn(
            f"{', '.join(loaded)} brings a second SQLite library into this process; opening the replicated database "
            "through it drops the locks of the first. Use the standard library's sqlite3 for that database.",
            RuntimeWarning,
            stacklevel=2,
        )
