"""inotify, through the C library: the five calls that watching folders takes, and the layout of its events.

Not watchdog, because that has one inotify instance and two threads for each folder that is watched by itself (Linux allows 128 instances to a
user), and a recursive watch of its takes in the metadata folders, three for each database, with everything that is written there.

Source: inotify(7); <sys/inotify.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["APPEARED", "CHANGED", "FOLDER", "GONE", "MASK", "OVERFLOW", "UNWATCHED", "Event", "Inotify", "parse_events"]

_MODIFY, _ATTRIB, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
OVERFLOW, UNWATCHED, FOLDER = 0x4000, 0x8000, 0x40000000
_UNMOUNT, _ONLYDIR = 0x2000, 0x01000000

CHANGED = _MODIFY | _ATTRIB
APPEARED = _CREATE | _MOVED_TO
GONE = _DELETE | _MOVED_FROM | _DELETE_SELF | _MOVE_SELF | _UNMOUNT
MASK = _MODIFY | APPEARED | _DELETE | _MOVED_FROM | _DELETE_SELF | _MOVE_SELF | _ATTRIB | _ONLYDIR

READ_BYTES = 1 << 18
_HEAD = struct.Struct("iIII")


@dataclass(frozen=True, slots=True)
class Event:
    """`watch`: the number of the watch, -1 for an overflow; `mask`: what happened; `name`: in the watched folder, empty for itself."""

    watch: int
    mask: int
    name: bytes


def parse_events(data: bytes) -> Iterator[Event]:
    """Yield the events of one read. Offset 0: watch, mask, cookie and length of the name, 4 bytes each; then the name, padded with zeros."""
    at = 0
    while at + _HEAD.size <= len(data):
        watch, mask, _, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Event(watch, mask, data[at : at + length].rstrip(b"\0"))
        at += length


class Inotify:
    """One instance. Its descriptor is not inherited, and reading never waits."""

    def __init__(self) -> None:
        """Raises `OSError`: EMFILE where a user has too many instances, ENOSYS where the system has no inotify."""
        try:
            library = ctypes.CDLL(None, use_errno=True)
            self._add, self._remove, init = library.inotify_add_watch, library.inotify_rm_watch, library.inotify_init1
        except (OSError, AttributeError) as error:
            raise OSError(errno.ENOSYS, "no inotify on this system") from error
        self._add.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
        self._remove.argtypes = [ctypes.c_int, ctypes.c_int]
        self.file: int = init(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.file < 0:
            raise _error("inotify_init1")

    def add(self, folder: bytes) -> int:
        """Watch a folder; returns the number of the watch, the same one for the same folder.

        Raises:
            OSError: ENOSPC when there are no watches left; ENOENT, EACCES, ENOTDIR for a folder that cannot be watched.
        """
        number: int = self._add(self.file, folder, MASK)
        if number < 0:
            raise _error(os.fsdecode(folder))
        return number

    def remove(self, watch: int) -> None:
        """Stop watching. One that is gone already is none."""
        self._remove(self.file, watch)

    def read(self) -> Iterator[Event]:
        """Yield what has happened; nothing when there is nothing."""
        try:
            data = os.read(self.file, READ_BYTES)
        except BlockingIOError:
            return
        yield from parse_events(data)

    def close(self) -> None:
        os.close(self.file)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
