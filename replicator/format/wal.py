"""The write-ahead log: header, frames, committed transactions.

Header, 32 bytes, big-endian: magic (0x377f0682: checksums over little-endian words, 0x377f0683: big-endian words), version 3007000, page size,
checkpoint sequence, salt-1, salt-2, checksum-1, checksum-2 (over the first 24 bytes).

Frame: 24 bytes header, then the page. Header, big-endian: page number, size of the database in pages for a commit frame else 0, salt-1, salt-2
(the header's), checksum-1, checksum-2 (over the first 8 bytes and the page, running on from the frame before).

In a live WAL a short frame, an old salt or a wrong checksum is the end and not an error: `scan_frames` returns what is valid before it.

Source: SQLite file format, section 4; specification, section 3.6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replicator.errors import ChecksumMismatch, FormatError, Truncated
from replicator.format.checksum import frame_checksums, wal_checksum
from replicator.format.sqlite import is_page_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "FRAME_HEADER_SIZE",
    "WAL_HEADER_SIZE",
    "FrameHeader",
    "Frames",
    "WALHeader",
    "decode_frame_header",
    "decode_wal_header",
    "frame_count",
    "frame_offset",
    "frame_size",
    "newest_frames",
    "scan_frames",
]

WAL_HEADER_SIZE = 32
FRAME_HEADER_SIZE = 24
MAGIC = 0x377F0682
VERSION = 3007000
FEW_FRAMES, FEW_PAGES = 32, 256
"""So many are looked at one by one: arrays cost more than what is in them."""
_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")


def frame_size(page_size: int) -> int:
    """Return the bytes of one frame."""
    return FRAME_HEADER_SIZE + page_size


def frame_offset(index: int, page_size: int) -> int:
    """Return the byte offset in the file of frame `index`, counted from 0."""
    return WAL_HEADER_SIZE + index * (FRAME_HEADER_SIZE + page_size)


def frame_count(wal_size_bytes: int, page_size: int) -> int:
    """Return how many whole frames a file of that size can hold; whether they are valid, only `scan_frames` knows."""
    return max(0, wal_size_bytes - WAL_HEADER_SIZE) // (FRAME_HEADER_SIZE + page_size)


@dataclass(frozen=True, slots=True)
class WALHeader:
    """The first 32 bytes. `big_endian`: byte order of the words that are summed, not of the fields."""

    big_endian: bool
    page_size: int
    checkpoint_seq: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    def encode(self) -> bytes:
        """Return the 32 bytes, with the checksum that is stored in this value."""
        return _HEADER.pack(
            MAGIC | self.big_endian, VERSION, self.page_size, self.checkpoint_seq, self.salt1, self.salt2, self.checksum1, self.checksum2
        )


def decode_wal_header(data: bytes | memoryview) -> WALHeader:
    """Decode the first 32 bytes of a WAL.

    Raises:
        Truncated: fewer than 32 bytes.
        FormatError: wrong magic, version or page size.
        ChecksumMismatch: torn, or not a header.

    Source: SQLite file format, section 4.1.
    """
    if len(data) < WAL_HEADER_SIZE:
        raise Truncated(f"WAL header has {len(data)} of {WAL_HEADER_SIZE} bytes")
    magic, version, page_size, sequence, salt1, salt2, checksum1, checksum2 = _HEADER.unpack_from(data)
    if magic & ~1 != MAGIC or version != VERSION:
        raise FormatError(f"not a WAL header: magic 0x{magic:08x}, version {version}")
    big_endian = bool(magic & 1)
    got = wal_checksum(data[:24], 0, 0, big_endian=big_endian)
    if got != (checksum1, checksum2):
        raise ChecksumMismatch("WAL header", expected=checksum1 << 32 | checksum2, got=got[0] << 32 | got[1], offset=24)
    if not is_page_size(page_size):
        raise FormatError(f"WAL header has page size {page_size}")
    return WALHeader(big_endian, page_size, sequence, salt1, salt2, checksum1, checksum2)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The 24 bytes before a page. `commit`: size of the database in pages after this transaction, 0 when it goes on."""

    pgno: int
    commit: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    def encode(self) -> bytes:
        """Return the 24 bytes."""
        return _FRAME.pack(self.pgno, self.commit, self.salt1, self.salt2, self.checksum1, self.checksum2)


def decode_frame_header(data: bytes | memoryview, offset: int = 0) -> FrameHeader:
    """Decode the 24 bytes, big-endian, that precede a page. Raises `Truncated`. Source: SQLite file format, section 4.1."""
    if len(data) - offset < FRAME_HEADER_SIZE:
        raise Truncated(f"frame header has {max(0, len(data) - offset)} of {FRAME_HEADER_SIZE} bytes")
    return FrameHeader(*_FRAME.unpack_from(data, offset))


@dataclass(frozen=True, slots=True)
class Frames:
    """Valid frames in the order of the WAL: page numbers, commit sizes (both shape (n,)) and running checksums (shape (n, 2))."""

    pgnos: NDArray[np.uint32]
    commits: NDArray[np.uint32]
    checksums: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.pgnos)

    def committed(self) -> int:
        """Return the number of frames up to and including the last commit frame; 0 when there is none."""
        found = self.commits.nonzero()[0]
        return int(found[-1]) + 1 if len(found) else 0


def scan_frames(data: bytes | memoryview, *, page_size: int, salts: tuple[int, int], checksum: tuple[int, int], big_endian: bool) -> Frames:
    """Return the longest run of valid whole frames at the start of `data`.

    Args:
        data: bytes from a frame boundary on; what follows the last whole frame is ignored.
        salts: of the WAL's header.
        checksum: running checksum before the first frame.
    """
    import numpy as np

    size = FRAME_HEADER_SIZE + page_size
    count = len(data) // size
    few: list[tuple[int, ...]] = []
    for at in range(0, min(count, FEW_FRAMES + 1) * size, size):
        fields = _FRAME.unpack_from(data, at)
        if fields[2:4] != salts or not fields[0]:
            break
        few.append(fields)
    if len(few) > FEW_FRAMES:
        return _scan_many(data, count, page_size=page_size, salts=salts, checksum=checksum, big_endian=big_endian)
    sums = frame_checksums(memoryview(data), len(few), page_size, *checksum, big_endian=big_endian)
    good = 0
    for fields, sum_ in zip(few, sums.tolist(), strict=True):
        if list(fields[4:]) != sum_:
            break
        good += 1
    pgnos = np.array([fields[0] for fields in few[:good]], dtype=np.uint32)
    return Frames(pgnos, np.array([fields[1] for fields in few[:good]], dtype=np.uint32), sums[:good])


def _scan_many(
    data: bytes | memoryview, count: int, *, page_size: int, salts: tuple[int, int], checksum: tuple[int, int], big_endian: bool
) -> Frames:
    import numpy as np

    size = FRAME_HEADER_SIZE + page_size
    rows = np.frombuffer(data, dtype=np.uint8, count=count * size).reshape(count, size)
    fields = np.ascontiguousarray(rows[:, :FRAME_HEADER_SIZE]).view(">u4").astype(np.uint32)
    plausible = (fields[:, 2] == salts[0]) & (fields[:, 3] == salts[1]) & (fields[:, 0] != 0)
    count = count if plausible.all() else int(plausible.argmin())
    sums = frame_checksums(memoryview(data), count, page_size, *checksum, big_endian=big_endian)
    equal = (sums == fields[:count, 4:]).all(axis=1)
    if not equal.all():
        count = int(equal.argmin())
    return Frames(fields[:count, 0].copy(), fields[:count, 1].copy(), sums[:count])


def newest_frames(pgnos: NDArray[np.uint32], limit: int) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Return the distinct page numbers up to `limit` in ascending order, and the index of the last frame of each."""
    import numpy as np

    if len(pgnos) <= FEW_PAGES:
        newest = {pgno: at for at, pgno in enumerate(pgnos.tolist()) if pgno <= limit}
        ordered = sorted(newest)
        return np.array(ordered, dtype=np.uint32), np.array([newest[pgno] for pgno in ordered], dtype=np.intp)
    distinct, index = np.unique(pgnos[::-1], return_index=True)
    inside = distinct <= limit
    return distinct[inside], len(pgnos) - 1 - index[inside]
