"""Change a database file in place while others read it through SQLite: all of a change, or nothing, also after a crash.

One change goes through these steps, which are those of an SQLite writer in rollback-journal mode:

1. Take the locks of an SQLite writer: PENDING and RESERVED, then the whole SHARED range once the readers have left.
2. Write the pages that will be overwritten or cut off to `<path>-journal`, below a header of zeros; sync it and its folder.
3. Write the header, sync: the journal is *hot* now. Whoever opens the database after a crash - SQLite or `recover` - puts the old pages back.
4. Write the new pages, cut the file, sync.
5. Overwrite the journal's header with zeros, sync: this is the commit. Delete the journal, give up the locks.

Page 1 is part of every change. Its bytes 24 to 27 (the change counter) take a new value, from which readers learn that their cache is
stale; its bytes 18 and 19 say rollback journal, so that no reader creates a `-wal` file. All other bytes are the source's.

POSIX locks belong to the process, and closing *any* descriptor of a file drops them. So the file has one descriptor here, and this
process must not open it through `sqlite3` meanwhile. One more lock, on a byte that SQLite does not use, keeps a second process from
changing the same file; processes that know nothing of it are found by the change counter.

Source: SQLite, "File Locking And Concurrency In SQLite Version 3"; specification, section 2.6.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote

from replicator.atomic import sync_directory, sync_file
from replicator.errors import CopyChanged, CopyInUse, FormatError, NotADatabase
from replicator.format.journal import JOURNAL_HEADER_SIZE, JOURNAL_SECTOR_SIZE, JournalHeader, encode_record
from replicator.format.sqlite import DATABASE_HEADER_SIZE, LOCK_OFFSET, decode_database_header, lock_pgno

__all__ = ["Change", "InPlace", "recover", "to_rollback_mode"]

PENDING, RESERVED_END = LOCK_OFFSET, LOCK_OFFSET + 2
SHARED_SIZE = 510
OWNER = LOCK_OFFSET + 512
"""SQLite's lock bytes end here."""

PATIENCE_S = 1.0
"""So long new readers are kept out while those inside finish; then they are let in again before the next try."""
PAUSE_S = 0.25
RETRY_S = 0.002
RECOVER_TIMEOUT_S = 30.0
BUFFER_BYTES = 1 << 20

log = logging.getLogger(__name__)

_open: set[tuple[int, int]] = set()
_open_guard = threading.Lock()


class Change(Protocol):
    """New contents of pages. `commit` is the size of the database in pages afterwards."""

    @property
    def page_size(self) -> int: ...

    @property
    def commit(self) -> int: ...

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield page numbers and pages, ascending, without the lock page; the same each time.

        Pages that are missing stay as they are. All are there when the page size changes, and all beyond the old size when the
        database grows.
        """


class InPlace:
    """An existing database file, opened for changes. A context manager; used by one thread."""

    def __init__(self, path: Path) -> None:
        """Open the file, after undoing what an earlier process left half done.

        Raises:
            CopyInUse: another `InPlace`, in this process or another, has the file open.
            CopyChanged: a `-wal` file with contents stands beside it, so somebody writes to it.
            NotADatabase: see there.
        """
        self.path = path
        with _open_guard:
            found = os.stat(path)
            key = (found.st_dev, found.st_ino)
            if key in _open:
                raise CopyInUse(path)
            recover(path)  # not later: it opens and closes the file
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._key = key
            _open.add(key)
        self._broken = False
        try:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, OWNER)
            except BlockingIOError:
                raise CopyInUse(path) from None
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        found = os.fstat(self._file)
        if (found.st_dev, found.st_ino) != self._key:
            raise CopyChanged(self.path, "replaced while it was opened")
        start = os.pread(self._file, DATABASE_HEADER_SIZE, 0)
        try:
            header = decode_database_header(start)
        except FormatError as error:
            raise NotADatabase(self.path, str(error)) from error
        self.page_size = header.page_size
        self.page_count, rest = divmod(found.st_size, self.page_size)
        if rest:
            raise CopyChanged(self.path, "its size is not a whole number of pages")
        self._counter = start[24:28]
        with contextlib.suppress(FileNotFoundError):
            if os.stat(f"{self.path}-wal").st_size:
                raise CopyChanged(self.path, "a -wal file stands beside it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()
        if self._broken and kind is not None and issubclass(kind, Exception):
            recover(self.path)

    def close(self) -> None:
        """Give up the file and all locks on it."""
        if self._file >= 0:
            file, self._file = self._file, -1
            with _open_guard:
                os.close(file)
                _open.discard(self._key)

    def apply(self, change: Change, stop: threading.Event) -> bool:
        """Make a change, whole and durable when this returns True. False: `stop` was set while readers were in the way.

        After any other exception than these the object is only closed; leaving its `with` block puts the old state back.

        Raises:
            CopyChanged: somebody else wrote to the file, replaced or deleted it; nothing is changed.
            OSError: such as a full disk.
        """
        if not self._lock(stop):
            return False
        try:
            self._check_untouched()
            self._broken = True
            self._apply(change)
            self._broken = False
        finally:
            if not self._broken:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 2 + SHARED_SIZE, PENDING)
        return True

    def leave_wal_mode(self, stop: threading.Event) -> bool:
        """Rewrite page 1 if it asks for WAL mode, as it does in a copy that was restored for other purposes."""
        if os.pread(self._file, 2, 18) == b"\1\1":
            return True
        if not self._lock(stop):  # readers in WAL mode hold SHARED for as long as they are connected
            return False
        for suffix in ("-wal", "-shm"):
            side = f"{self.path}{suffix}"
            with contextlib.suppress(FileNotFoundError):
                if suffix == "-wal" and os.stat(side).st_size:
                    raise CopyChanged(self.path, "a -wal file stands beside it")
                os.unlink(side)
        return self.apply(_Nothing(self.page_size, self.page_count), stop)

    # -- locks -------------------------------------------------------------------------------------------------------------------

    def _lock(self, stop: threading.Event) -> bool:
        told = False
        while True:
            until = time.monotonic() + PATIENCE_S
            while True:
                if self._try(2, PENDING) and self._try(SHARED_SIZE, RESERVED_END):
                    return True
                if stop.is_set() or time.monotonic() > until:
                    break
                time.sleep(RETRY_S)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 2 + SHARED_SIZE, PENDING)
            if not told:
                log.warning("follow: waiting for readers path=%s", self.path)
                told = True
            if stop.wait(PAUSE_S):
                return False

    def _try(self, size: int, start: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, size, start)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX likes
            return False
        return True

    def _check_untouched(self) -> None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            raise CopyChanged(self.path, "deleted") from None
        if (found.st_dev, found.st_ino) != self._key:
            raise CopyChanged(self.path, "replaced")
        if found.st_size != self.page_count * self.page_size or os.pread(self._file, 4, 24) != self._counter:
            raise CopyChanged(self.path, "another process wrote to it")

    # -- the change --------------------------------------------------------------------------------------------------------------

    def _apply(self, change: Change) -> None:
        journal = _Journal(self.path, self._file, self.page_size, self.page_count)
        try:
            first, counter = self._new_first_page(change)
            if change.page_size != self.page_size:
                journal.add_range(1, self.page_count)
            else:
                for pgno, _ in self._differing(change):
                    if pgno <= self.page_count:
                        journal.add(pgno)
                if not journal.records and change.commit == self.page_count and self._same(first):
                    journal.discard()
                    return
                journal.add(1)
                journal.add_range(max(2, change.commit + 1), self.page_count)
            journal.make_hot()
            size = change.page_size
            out = _Writer(self._file)
            for pgno, page in self._differing(change):
                out.write((pgno - 1) * size, page)
            out.write(0, first)
            out.flush()
            os.ftruncate(self._file, change.commit * size)
            sync_file(self._file)
            journal.commit()
        finally:
            journal.close()
        self.page_size, self.page_count, self._counter = size, change.commit, counter

    def _new_first_page(self, change: Change) -> tuple[bytes, bytes]:
        found = next(change.pages(), None)
        page = found[1] if found is not None and found[0] == 1 else os.pread(self._file, self.page_size, 0)
        counter = self._counter
        # Nor the number in bytes 92 to 95: while the two differ, SQLite takes the size from the file and not from the header.
        while counter in (self._counter, page[92:96]):
            counter = secrets.token_bytes(4)
        return b"".join((page[:18], b"\1\1", page[20:24], counter, page[28:])), counter

    def _same(self, first: bytes) -> bool:
        """Is page 1 what it will be, but for the counter?"""
        old = os.pread(self._file, self.page_size, 0)
        return old[:24] == first[:24] and old[28:] == first[28:]

    def _differing(self, change: Change) -> Iterator[tuple[int, bytes]]:
        """Yield the pages after the first that are not yet in the file. Each may be written as soon as it was yielded."""
        same_size = change.page_size == self.page_size
        for pgno, page in change.pages():
            if pgno == 1:
                continue
            if same_size and pgno <= self.page_count and os.pread(self._file, self.page_size, (pgno - 1) * self.page_size) == page:
                continue
            yield pgno, page


class _Nothing:
    """A change of page 1's header only."""

    def __init__(self, page_size: int, commit: int) -> None:
        self.page_size, self.commit = page_size, commit

    def pages(self) -> Iterator[tuple[int, bytes]]:
        return iter(())


class _Writer:
    """Positioned writes; those that follow each other become one."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._start = self._size = 0
        self._parts: list[bytes] = []

    def write(self, at: int, data: bytes) -> None:
        if self._parts and (at != self._start + self._size or self._size >= BUFFER_BYTES):
            self.flush()
        if not self._parts:
            self._start = at
        self._parts.append(data)
        self._size += len(data)

    def flush(self) -> None:
        view, at = memoryview(b"".join(self._parts)), self._start
        while view:
            done = os.pwrite(self._file, view, at)
            view, at = view[done:], at + done
        self._parts, self._size = [], 0


class _Journal:
    """The rollback journal of one change to `database`."""

    def __init__(self, path: Path, database: int, page_size: int, page_count: int) -> None:
        self._path, self._database, self._page_size, self._page_count = f"{path}-journal", database, page_size, page_count
        if _is_hot(self._path):
            raise CopyChanged(path, "another process left a hot journal beside it")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        like = os.fstat(database)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        # Whoever may read the database must be able to roll it back.
        os.fchmod(self._file, like.st_mode & 0o777)
        if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.fchown(self._file, like.st_uid, like.st_gid)
        self.records = 0
        self._nonce = secrets.randbits(32)
        self._out = _Writer(self._file)

    def add(self, pgno: int) -> None:
        """Keep a page as it is now."""
        page = os.pread(self._database, self._page_size, (pgno - 1) * self._page_size)
        record = encode_record(pgno, page, self._nonce)
        self._out.write(JOURNAL_SECTOR_SIZE + self.records * len(record), record)
        self.records += 1

    def add_range(self, first: int, last: int) -> None:
        lock = lock_pgno(self._page_size)
        for pgno in range(first, last + 1):
            if pgno != lock:
                self.add(pgno)

    def make_hot(self) -> None:
        """From here on a crash undoes the change."""
        self._out.flush()
        # Before the header makes the records count: their checksums see one byte in 200, too little to tell torn ones.
        sync_file(self._file)
        sync_directory(os.path.dirname(self._path))
        self._put_header(JournalHeader(self.records, self._nonce, self._page_count, self._page_size).encode())

    def commit(self) -> None:
        """From here on nothing undoes the change."""
        # Zeros before deleting: a deleted name may come back after a power cut, since its folder is not synced.
        self._put_header(bytes(JOURNAL_HEADER_SIZE))
        os.unlink(self._path)

    def _put_header(self, header: bytes) -> None:
        self._out.write(0, header)
        self._out.flush()
        sync_file(self._file)

    def discard(self) -> None:
        os.unlink(self._path)

    def close(self) -> None:
        os.close(self._file)


def recover(path: Path) -> None:
    """Let SQLite put back the state before a change that was cut off. To be called while this process has no descriptor of the file.

    Raises:
        CopyChanged: there is a journal, and SQLite does not roll it back.
    """
    journal = f"{path}-journal"
    if _is_hot(journal):
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, isolation_level=None, timeout=RECOVER_TIMEOUT_S
        )
        try:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise CopyChanged(path, f"its journal cannot be rolled back: {error}") from error
        finally:
            connection.close()
        log.info("follow: rolled back an unfinished change path=%s", path)
        if _is_hot(journal):
            raise CopyChanged(path, "its journal cannot be rolled back")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal)


def to_rollback_mode(file: int) -> None:
    """Make the header of a database file that nobody else has open yet say rollback journal, so that readers create no `-wal`."""
    os.pwrite(file, b"\1\1", 18)


def _is_hot(journal: str) -> bool:
    try:
        file = os.open(journal, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return os.read(file, 1) not in (b"", b"\0")
    finally:
        os.close(file)
