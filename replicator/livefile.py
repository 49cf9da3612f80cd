"""The one place that opens live database files.

Closing any descriptor of a database file drops all POSIX locks that the process holds on it, SQLite's included: another process could
then checkpoint or restart the WAL under a reader of this one. So a file is opened once for each inode, read-only, and its descriptor
stays open for the life of the process. The `-shm` file, which carries the WAL's locks, is never opened here at all.

Source: SQLite, "How To Corrupt An SQLite Database File", section 2.2.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path

__all__ = ["descriptor", "warn_about_second_library"]

_lock = threading.Lock()
_descriptors: dict[tuple[int, int], int] = {}


def descriptor(path: Path) -> int:
    """Return a read-only descriptor of the file that stands at `path` now. Never close it.

    Raises:
        OSError: as `os.open` does.
    """
    with _lock:
        found = os.stat(path)
        key = (found.st_dev, found.st_ino)
        if key in _descriptors:
            return _descriptors[key]
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened = os.fstat(file)
        # The file may have been replaced between the two calls; what was opened is what counts, and it is never closed.
        return _descriptors.setdefault((opened.st_dev, opened.st_ino), file)


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
