"""A full image of one committed state, taken while commits and checkpoints go on.

A snapshot is read in slices of about a mebibyte, each under the engine's lock, so that neither the lock nor a pin is held for long. To
stay exact it keeps what later transactions overwrite: before changes become part of the engine's position, `preserve` saves the images
that the snapshot still has to read (copy on write). So at every moment

    a page not yet read  =  the saved image, if there is one, else its image at the engine's position.

WAL offsets are never carried over a checkpoint: when the WAL's salts change, all that it held is in the database file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from replicator.errors import DatabaseStateError
from replicator.format.sqlite import lock_pgno

if TYPE_CHECKING:
    from replicator.db import Database
    from replicator.format.ltx import TXID
    from replicator.tail import WALPosition
    from replicator.walreader import Changes

__all__ = ["Snapshot"]

SLICE_BYTES = 1 << 20


class Snapshot:
    """The pages of the state at `txid`. All methods but `pages` are called under the engine's lock. A context manager."""

    def __init__(self, database: Database, *, txid: TXID, commit: int, position: WALPosition, folder: Path) -> None:
        """Begin at the engine's position, which must be `position`. `folder` takes a temporary file for saved pages."""
        self.txid = txid
        self.commit = commit
        self.page_size = database.page_size
        self._database = database
        self._salts = position.salts
        self._overlay = database.overlay(position)
        self._next = 1
        self._cancelled = ""
        self._saved: dict[int, int] = {}
        self._spill: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self._spill.close()

    def preserve(self, changes: Changes) -> None:
        """Save the images that `changes` is about to replace or cut off, then follow the engine to their end."""
        try:
            for pgno in changes.pgnos.tolist():
                self._save(pgno)
            for pgno in range(max(self._next, changes.commit + 1), self.commit + 1):
                self._save(pgno)
        except OSError as error:
            self.cancel(f"cannot save a page that is overwritten: {(error.strerror or str(error)).lower()}")  # replication goes on
        if changes.end.salts != self._salts:
            self._salts = changes.end.salts
            self._overlay = {}
        self._overlay.update(zip(changes.pgnos.tolist(), changes.offsets.tolist(), strict=True))

    def cancel(self, reason: str) -> None:
        """Make `pages` fail: the state can no longer be told apart from later ones."""
        self._cancelled = reason

    def pages(self, lock: Callable[[], AbstractContextManager[object]]) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (pgno, image) of all pages but the lock page, in order. `lock()` gives the engine's lock."""
        size = self.page_size
        step = max(1, SLICE_BYTES // size)
        skip = lock_pgno(size)
        while self._next <= self.commit:
            with lock():
                if self._cancelled:
                    raise DatabaseStateError(f"snapshot of TXID {self.txid:016x} abandoned: {self._cancelled}", hint="take it again")
                first = self._next
                count = min(step, self.commit - first + 1)
                data = self._database.pages(first, count, self._overlay, self._salts)
                saved = {pgno: self._load(self._saved.pop(pgno)) for pgno in range(first, first + count) if pgno in self._saved}
                self._next = first + count
            view = memoryview(data)
            for pgno in range(first, first + count):
                if pgno != skip:
                    at = (pgno - first) * size
                    yield pgno, saved.get(pgno) or view[at : at + size]

    def _save(self, pgno: int) -> None:
        if not self._next <= pgno <= self.commit or pgno in self._saved:
            return
        self._spill.seek(0, 2)
        self._saved[pgno] = self._spill.tell()
        self._spill.write(self._database.pages(pgno, 1, self._overlay, self._salts))

    def _load(self, offset: int) -> bytes:
        self._spill.seek(offset)
        return self._spill.read(self.page_size)
