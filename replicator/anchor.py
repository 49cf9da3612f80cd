"""A proof that a process, or a lease in it, is gone: a file that it had locked for as long as it lived, and that can be locked now.

A lease that is a database's own lives no longer than the lock on the database's folder. One that guards many databases lives longer than its use by any
of them, so that it has a lock of its own: `lease.lock`, in the folder of the database that was begun first. The others remember where that is.

The system gives the lock up when the process dies, however it dies. Where the file is not found, or is another one, nothing is proven.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Anchor", "is_gone"]

NAME = "lease.lock"

_anchors: weakref.WeakSet[Anchor] = weakref.WeakSet()


def _in_child() -> None:
    # The lock lives as long as any descriptor of it: a child must not keep it when its parent dies.
    for anchor in _anchors:
        anchor.close()


os.register_at_fork(after_in_child=_in_child)


class Anchor:
    """A locked file. `place`: what others need to know of it."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError`; `BlockingIOError` where another one is held there."""
        path = folder / NAME
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(self._file)
        except OSError:
            self.close()
            raise
        self.place: dict[str, object] = {"path": str(path), "inode": found.st_ino, "device": found.st_dev}
        _anchors.add(self)

    def close(self) -> None:
        """Let it go. Closing twice does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def is_gone(place: Mapping[str, object]) -> bool:
    """Say whether it is proven that nobody holds an anchor any more."""
    with contextlib.suppress(OSError):
        file = os.open(str(place.get("path")), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(file)
            if (found.st_ino, found.st_dev) == (place.get("inode"), place.get("device")):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        finally:
            os.close(file)
    return False
