"""Page checksums of the last replicated state, in a memory-mapped file.

The table says, for each page of the state that the replica holds (or that is staged for it), its 64-bit checksum. With it, two states
can be compared by reading only one of them: whatever happened to the database while nobody watched, the next sync uploads exactly the
pages that differ. It lives on disk and is mapped, so that memory does not grow with the database.

File:

| offset | size | content |
|---|---|---|
| 0 | 256 | header slot A |
| 256 | 256 | header slot B |
| 4096 | 8 * n | checksum of page 1, 2, ... n, little-endian; 0 for the lock page. Beyond `commit` anything may be left: it is cleared when the database grows |

Header slot, little-endian: magic, sequence number, lineage, TXID, page size, commit, XOR of all entries, timestamp, the TXID and XOR that an
update in progress leads to, WAL salts, offset and running checksum of the last synced frame, CRC-32 of the slot. The valid slot
with the higher sequence number counts; writing goes to the other one.

**Crashes.** An update writes a slot that announces the next TXID and XOR, then the entries, then a slot that has arrived there. A killed
process leaves the table at the old state, at the new one, or between: in the last case the XOR of the entries matches
neither, and applying the announced file again (it is idempotent) must produce the announced XOR. A power cut may leave any mixture of
old and new blocks, since the table is not synced at each update; the XOR finds that too, and the caller rebuilds the table
from the replica. Nothing depends on the table for being right, only for being fast, so the hot path has no fsync here.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.errors import FormatError
from replicator.format.ltx import TXID
from replicator.tail import NO_WAL, WALPosition

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Checksums = NDArray[np.uint64]
    Pgnos = NDArray[np.uint32]

__all__ = ["PageTable", "TableState"]

MAGIC = b"PYREPLT1"
SLOT_SIZE = 256
NO_TXID = TXID(0)
ENTRIES_AT = 4096
ENTRY_SIZE = 8
MIN_GROWTH, MAX_GROWTH = 1 << 12, 1 << 20
BATCH = 1 << 16
FEW_PAGES = 16
_ENTRY = struct.Struct("<Q")
_SLOT = struct.Struct("<8sQ16sQIIQqQQIIqIII")


@dataclass(frozen=True, slots=True)
class TableState:
    """What the entries describe.

    Attributes:
        lineage: 16 bytes that name the history of this database and its replicas.
        txid: newest TXID whose pages are in the table; 0 for an empty table.
        page_size, commit: bytes, and database size in pages.
        xor: XOR of all page checksums.
        timestamp_ms: header time of the newest file, so that times never run backwards.
        next_txid, next_xor: where an update that was cut short leads; equal to `txid`, `xor` when there is none.
        position: end of the last synced WAL frame.
    """

    lineage: bytes
    txid: TXID
    page_size: int
    commit: int
    xor: int = 0
    timestamp_ms: int = 0
    next_txid: TXID = NO_TXID
    next_xor: int = 0
    position: WALPosition = NO_WAL


class PageTable:
    """The open table of one database. Not safe for use from several threads at once."""

    def __init__(self, path: Path, file: int, state: TableState, sequence: int) -> None:
        self._path = path
        self._file = file
        self._sequence = sequence
        self._map = mmap.mmap(file, os.fstat(file).st_size)
        self.state = state

    @classmethod
    def create(cls, path: Path, *, lineage: bytes, page_size: int) -> PageTable:
        """Begin an empty table at TXID 0, replacing what stood there."""
        temporary = path.with_suffix(".tmp")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _allocate(file, ENTRIES_AT + MIN_GROWTH)
            os.replace(temporary, path)
            table = cls(path, file, TableState(lineage, TXID(0), page_size, 0), 0)
        except BaseException:
            os.close(file)
            raise
        table._write_slot()
        return table

    @classmethod
    def open(cls, path: Path) -> PageTable | None:
        """Open the table that stands at `path`; None when there is none, or none that can be read."""
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(file).st_size
            newest = _newest_slot(file)
            if newest is None or size < ENTRIES_AT:
                raise FormatError("no valid header")
            sequence, state = newest
            if size < ENTRIES_AT + state.commit * ENTRY_SIZE:
                raise FormatError("too short")
            return cls(path, file, state, sequence)
        except FormatError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise

    @staticmethod
    def read_state(path: Path) -> TableState | None:
        """Return what the table at `path` describes, without opening it for use: an engine may be at work on it. None when there is none."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            newest = _newest_slot(file)
            return newest[1] if newest is not None else None
        finally:
            os.close(file)

    @property
    def is_intact(self) -> bool:
        """True when the entries are those of `state`: their XOR is the recorded one."""
        return self._xor(self.state.commit) == self.state.xor

    def repair(self, txid: TXID, pgnos: Pgnos, checksums: Checksums, commit: int, timestamp_ms: int) -> bool:
        """Finish an update that was cut short by applying its file again. True when the announced XOR comes out."""
        if txid != self.state.next_txid:
            return False
        self._store(pgnos, checksums, commit)
        if self._xor(commit) != self.state.next_xor:
            return False
        self.state = replace(self.state, txid=txid, commit=commit, xor=self.state.next_xor, timestamp_ms=timestamp_ms, position=NO_WAL)
        self._write_slot()
        return True

    def get(self, first: int, count: int) -> Checksums:
        """Return a copy of the entries of pages `first` to `first + count - 1`; 0 beyond the end."""
        import numpy as np

        result = np.zeros(count, dtype=np.uint64)
        have = max(0, min(count, self.state.commit - first + 1))
        if have:
            result[:have] = np.frombuffer(self._map, dtype="<u8", count=have, offset=ENTRIES_AT + (first - 1) * ENTRY_SIZE)
        return result

    def apply(self, txid: TXID, pgnos: Pgnos, checksums: Checksums, *, commit: int, timestamp_ms: int, position: WALPosition) -> None:
        """Move to the state after the file `txid`.

        Call it only when that file is stored, or durably staged.

        Args:
            pgnos, checksums: the pages of the file, without the lock page, each at most once.
            commit: database size in pages after it.
            position: end of the WAL frames that it covers.
        """
        old = self.state
        self._reserve(max(commit, old.commit))
        if commit > old.commit:  # a crash may have left something there
            self._map[ENTRIES_AT + old.commit * ENTRY_SIZE : ENTRIES_AT + commit * ENTRY_SIZE] = bytes((commit - old.commit) * ENTRY_SIZE)
        xor = self.xor_after(pgnos, checksums, commit=commit)
        self.state = TableState(
            old.lineage, old.txid, old.page_size, old.commit, old.xor, old.timestamp_ms, txid, xor, old.position
        )  # `replace` takes longer than all the rest
        self._write_slot()
        self._store(pgnos, checksums, commit)
        self.state = TableState(old.lineage, txid, old.page_size, commit, xor, timestamp_ms, txid, xor, position)
        self._write_slot()

    def xor_after(self, pgnos: Pgnos, checksums: Checksums, *, commit: int) -> int:
        """Return the XOR that `apply` with the same arguments leads to."""
        if len(pgnos) <= FEW_PAGES and commit >= self.state.commit:
            return self._xor_after_few(pgnos.tolist(), checksums.tolist())
        import numpy as np

        old = self.state
        entries = np.frombuffer(self._map, dtype="<u8", count=old.commit, offset=ENTRIES_AT)
        xor = old.xor ^ int(np.bitwise_xor.reduce(checksums))
        for start in range(0, len(pgnos), BATCH):
            part = pgnos[start : start + BATCH]
            xor ^= int(np.bitwise_xor.reduce(entries[part[part <= old.commit].astype(np.int64) - 1]))
        if commit < old.commit:
            # `pgnos` has none beyond `commit`, so that no page is taken out twice.
            xor ^= int(np.bitwise_xor.reduce(entries[commit:]))
        del entries
        return xor

    def _xor_after_few(self, pgnos: Sequence[int], checksums: Sequence[int]) -> int:
        """The same for a few pages of a database that does not shrink: arrays would cost more than what is in them."""
        xor, have = self.state.xor, self.state.commit
        for pgno, checksum in zip(pgnos, checksums, strict=True):
            xor ^= checksum
            if pgno <= have:
                xor ^= _ENTRY.unpack_from(self._map, ENTRIES_AT + (pgno - 1) * ENTRY_SIZE)[0]
        return xor

    def move(self, position: WALPosition) -> None:
        """Record that the WAL was read up to `position` without a change to the state."""
        if position != self.state.position:
            self.state = replace(self.state, position=position)
            self._write_slot()

    def sync(self) -> None:
        """Write the table to the disk. Spares a rebuild after a power cut; correctness does not need it."""
        self._map.flush()

    def close(self) -> None:
        """Sync and unmap. Closing twice does nothing."""
        if self._file >= 0:
            self._map.flush()
            self._map.close()
            os.close(self._file)
            self._file = -1

    def _reserve(self, pages: int) -> None:
        need = ENTRIES_AT + pages * ENTRY_SIZE
        if need <= len(self._map):
            return
        # Ten thousand small databases have ten thousand small tables; a large one does not grow every few pages.
        growth = min(max(MIN_GROWTH, 1 << need.bit_length() - 2), MAX_GROWTH)
        size = -(-need // growth) * growth
        _allocate(self._file, size)
        self._map.close()
        self._map = mmap.mmap(self._file, size)

    def _store(self, pgnos: Pgnos, checksums: Checksums, commit: int) -> None:
        self._reserve(commit)
        if len(pgnos) <= FEW_PAGES:
            for pgno, checksum in zip(pgnos.tolist(), checksums.tolist(), strict=True):
                _ENTRY.pack_into(self._map, ENTRIES_AT + (pgno - 1) * ENTRY_SIZE, checksum)
            return
        import numpy as np

        entries = np.frombuffer(self._map, dtype="<u8", offset=ENTRIES_AT).view()
        for start in range(0, len(pgnos), BATCH):
            entries[pgnos[start : start + BATCH].astype(np.int64) - 1] = checksums[start : start + BATCH]
        del entries

    def _xor(self, commit: int) -> int:
        import numpy as np

        if not commit:
            return 0
        return int(np.bitwise_xor.reduce(np.frombuffer(self._map, dtype="<u8", count=commit, offset=ENTRIES_AT)))

    def _write_slot(self) -> None:
        self._sequence += 1
        s = self.state
        body = _SLOT.pack(
            MAGIC, self._sequence, s.lineage, s.txid, s.page_size, s.commit, s.xor, s.timestamp_ms, s.next_txid, s.next_xor,
            *s.position.salts, s.position.offset, *s.position.checksum, 0,
        )[:-4]  # fmt: skip
        at = (self._sequence % 2) * SLOT_SIZE
        self._map[at : at + _SLOT.size] = body + struct.pack("<I", zlib.crc32(body))


def _allocate(file: int, size: int) -> None:
    """Give a file its size with blocks behind it: writing through a map into a hole of a full disk kills the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def _newest_slot(file: int) -> tuple[int, TableState] | None:
    slots = (_decode_slot(os.pread(file, SLOT_SIZE, at)) for at in (0, SLOT_SIZE))
    return max((slot for slot in slots if slot is not None), key=lambda slot: slot[0], default=None)


def _decode_slot(data: bytes) -> tuple[int, TableState] | None:
    if len(data) < _SLOT.size:
        return None
    fields = _SLOT.unpack_from(data)
    if fields[0] != MAGIC or zlib.crc32(data[: _SLOT.size - 4]) != fields[-1]:
        return None
    _, sequence, lineage, txid, page_size, commit, xor, timestamp_ms, next_txid, next_xor, salt1, salt2, offset, c1, c2, _ = fields
    position = WALPosition((salt1, salt2), offset, (c1, c2))
    return sequence, TableState(lineage, TXID(txid), page_size, commit, xor, timestamp_ms, TXID(next_txid), next_xor, position)
