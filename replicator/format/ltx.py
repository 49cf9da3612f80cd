"""LTX files: names, header, page frames, page index, trailer; a streaming encoder and decoder.

    header (100) | page frame * n | end marker (6 zero bytes) | page index | index size (8) | trailer (16)

Header, big-endian:

| offset | size | field |
|---|---|---|
| 0 | 4 | magic `LTX1` |
| 4 | 4 | flags; only 0x2 (NoChecksum) is legal, and always written |
| 8 | 4 | page size |
| 12 | 4 | commit: size of the database in pages |
| 16 | 8 | min TXID |
| 24 | 8 | max TXID |
| 32 | 8 | timestamp, milliseconds since 1970 |
| 40 | 8 | pre-apply checksum |
| 48 | 8 | WAL offset |
| 56 | 8 | WAL size |
| 64 | 8 | WAL salt-1, salt-2 |
| 72 | 8 | node id (the writer's id in our files) |
| 80 | 20 | reserved |

Page frame: page number (4), flags (2); with flag 1 a length (4) and a raw LZ4 block; without it (files of early 0.5 versions, only read) one
LZ4 frame. Page index: for each page the unsigned LEB128 varints page number, offset, size; a zero byte; the size of all that (8).
Trailer: post-apply checksum (8), file checksum (8). The file checksum covers everything before it, with each page uncompressed.

Source: specification, section 1.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import NewType

import lz4.block
from fastcrc.crc64 import go_iso

from replicator.errors import ChecksumMismatch, FormatError, Truncated
from replicator.format.checksum import CHECKSUM_FLAG, page_checksum
from replicator.format.pageindex import encode_index, frames
from replicator.format.sqlite import is_page_size, lock_pgno

__all__ = [
    "LTX_HEADER_SIZE",
    "MAX_LEVEL",
    "NO_CHECKSUM",
    "SNAPSHOT_LEVEL",
    "TRAILER_SIZE",
    "TXID",
    "Decoder",
    "EncodedFile",
    "Encoder",
    "FileInfo",
    "Header",
    "Trailer",
    "decode_file",
    "decode_header",
    "decode_trailer",
    "encode_file",
    "format_name",
    "format_txid",
    "index_range",
    "parse_name",
    "parse_txid",
]

TXID = NewType("TXID", int)
LTX_HEADER_SIZE = 100
TRAILER_SIZE = 16
MAX_LEVEL = SNAPSHOT_LEVEL = 9
NO_CHECKSUM = 0x2
MAGIC = b"LTX1"
BLOCK = 0x1
END_MARKER = bytes(6)
WRITE_BYTES = 1 << 18
INDEX_BATCH = 1 << 12
_HEADER = struct.Struct(">4sIIIQQqQqqIIQ20s")
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.ltx", re.ASCII)
_PAGE = struct.Struct(">IHI")
_PAGE_START = struct.Struct(">IH")
_TRAILER = struct.Struct(">QQ")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LZ4_FRAME_MAGIC = 0x184D2204

Bytes = bytes | bytearray | memoryview
DecodedPage = tuple[int, bytes, bytes]


def format_txid(txid: int) -> str:
    """Return 16 lower-case hex digits."""
    return f"{txid:016x}"


def parse_txid(text: str) -> TXID:
    """Read 16 hex digits. Raises `FormatError`."""
    if not re.fullmatch(r"[0-9a-fA-F]{16}", text, re.ASCII):
        raise FormatError(f"invalid txid: {text!r} (16 hex digits)")
    return TXID(int(text, 16))


def format_name(min_txid: int, max_txid: int) -> str:
    """Return the file name of a range of TXIDs, both inclusive."""
    return f"{min_txid:016x}-{max_txid:016x}.ltx"


def parse_name(name: str) -> tuple[TXID, TXID] | None:
    """Return the range that a file name stands for; None for every other name, reversed ranges and TXID 0 included."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    low, high = int(match[1], 16), int(match[2], 16)
    return (TXID(low), TXID(high)) if 1 <= low <= high else None


@dataclass(frozen=True, slots=True, order=True)
class FileInfo:
    """A stored file, as a listing shows it: `size` in bytes, `created_at` aware and in UTC. Ordered by its TXIDs."""

    level: int = field(compare=False)
    min_txid: TXID
    max_txid: TXID
    size: int = field(compare=False)
    created_at: datetime = field(compare=False)

    @property
    def name(self) -> str:
        """The file's name without folder."""
        return format_name(self.min_txid, self.max_txid)


@dataclass(frozen=True, slots=True)
class Header:
    """The first 100 bytes. Sizes and offsets in bytes, `commit` in pages."""

    page_size: int
    commit: int
    min_txid: TXID
    max_txid: TXID
    timestamp_ms: int
    pre_apply_checksum: int = 0
    wal_offset: int = 0
    wal_size: int = 0
    wal_salt1: int = 0
    wal_salt2: int = 0
    node_id: int = 0
    flags: int = NO_CHECKSUM

    @property
    def is_snapshot(self) -> bool:
        """True when the file holds every page, so that nothing before it is needed."""
        return self.min_txid == 1

    @property
    def created_at(self) -> datetime:
        """The timestamp as an aware datetime. Raises `FormatError` when it lies outside the years 1 to 9999."""
        try:
            return _EPOCH + timedelta(milliseconds=self.timestamp_ms)
        except OverflowError as error:
            raise FormatError(f"invalid timestamp: {self.timestamp_ms} ms") from error

    def encode(self) -> bytes:
        """Return the 100 bytes."""
        return _HEADER.pack(
            MAGIC, self.flags, self.page_size, self.commit, self.min_txid, self.max_txid, self.timestamp_ms, self.pre_apply_checksum,
            self.wal_offset, self.wal_size, self.wal_salt1, self.wal_salt2, self.node_id, bytes(20),
        )  # fmt: skip

    def validate(self) -> None:
        """Check what the fields mean. Raises `FormatError`. Source: specification, section 1.1."""
        if self.flags & ~NO_CHECKSUM:
            raise FormatError(f"invalid flags: 0x{self.flags:08x}")
        if not is_page_size(self.page_size):
            raise FormatError(f"invalid page size: {self.page_size}")
        if self.min_txid == 0 or self.max_txid == 0:
            raise FormatError("minimum transaction id required" if self.min_txid == 0 else "maximum transaction id required")
        if self.min_txid > self.max_txid:
            raise FormatError(f"transaction ids out of order: {format_txid(self.min_txid)} > {format_txid(self.max_txid)}")
        if self.wal_offset < 0 or self.wal_size < 0:
            raise FormatError(f"negative wal offset or size: {self.wal_offset}, {self.wal_size}")
        if (self.wal_salt1 or self.wal_salt2 or self.wal_size) and not self.wal_offset:
            raise FormatError("wal offset required with wal salts or a wal size")
        if self.is_snapshot and self.pre_apply_checksum:
            raise FormatError("pre-apply checksum must be zero on snapshots")
        if self.flags & NO_CHECKSUM:
            if self.pre_apply_checksum:
                raise FormatError("pre-apply checksum not allowed")
        elif not self.is_snapshot and not self.pre_apply_checksum & CHECKSUM_FLAG:
            raise FormatError("pre-apply checksum required")


def decode_header(data: Bytes) -> Header:
    """Decode the first 100 bytes; `validate` checks their meaning. Raises `Truncated`, `FormatError` (magic)."""
    if len(data) < LTX_HEADER_SIZE:
        raise Truncated(f"invalid ltx file: {len(data)} bytes, minimum {LTX_HEADER_SIZE}")
    magic, flags, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("invalid LTX file" if magic[:3] != b"LTX" else "invalid version")
    page_size, commit, low, high, timestamp, pre, wal_offset, wal_size, salt1, salt2, node, _ = rest
    return Header(page_size, commit, TXID(low), TXID(high), timestamp, pre, wal_offset, wal_size, salt1, salt2, node, flags)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 16 bytes."""

    post_apply_checksum: int
    file_checksum: int


def decode_trailer(data: Bytes) -> Trailer:
    """Decode the last 16 bytes. Raises `Truncated`."""
    if len(data) != TRAILER_SIZE:
        raise Truncated(f"trailer has {len(data)} of {TRAILER_SIZE} bytes")
    return Trailer(*_TRAILER.unpack(data))


def index_range(file_size: int, tail: Bytes) -> tuple[int, int]:
    """Return offset and size of the page index, from the last 24 bytes of the file. Raises `FormatError`."""
    if len(tail) != 24 or file_size < LTX_HEADER_SIZE + len(END_MARKER) + 1 + 24:
        raise Truncated(f"invalid ltx file: {file_size} bytes")
    size = int.from_bytes(tail[:8], "big")
    offset = file_size - 24 - size
    if size < 1 or offset < LTX_HEADER_SIZE + len(END_MARKER):
        raise FormatError(f"page index size {size} does not fit into the file")
    return offset, size


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """What `Encoder.close` wrote in all: bytes, pages."""

    size: int
    file_checksum: int
    page_count: int


class Encoder:
    """Write one file, with its pages in ascending order."""

    def __init__(self, write: Callable[[bytes], object], header: Header) -> None:
        """Validate and write the header. `write` gets pieces of 256 KiB or a batch."""
        header.validate()
        if not header.flags & NO_CHECKSUM:
            raise FormatError("only files without tracked checksums are written")
        self._write = write
        self._header = header
        self._commit, self._page_size, self._lock = header.commit, header.page_size, lock_pgno(header.page_size)
        self._last = 0
        start = header.encode()
        self._crc = go_iso(start)
        self._written = 0
        self._parts: list[Bytes] = [start]
        self._waiting = len(start)
        self._pgnos, self._sizes = array("I"), array("I")

    def pages(self, batch: Iterable[tuple[int, Bytes]]) -> None:
        """Compress and write pages, given as (pgno, page). Raises `FormatError` when one breaks a rule of section 1.6."""
        compress = lz4.block.compress
        self.blocks([(pgno, page, compress(page, store_size=False)) for pgno, page in batch])

    def blocks(self, batch: Iterable[tuple[int, Bytes, Bytes]]) -> None:
        """Write pages that are compressed already, as (pgno, page, block): `block` is the raw LZ4 block of `page`."""
        crc, last, lock, commit, page_size, written = self._crc, self._last, self._lock, self._commit, self._page_size, 0
        pack, add, add_pgno, add_size = _PAGE.pack, self._parts.append, self._pgnos.append, self._sizes.append
        for pgno, page, block in batch:
            # The page that follows its predecessor passes with four comparisons; all else is looked at closely.
            if pgno != last + 1 or pgno == lock or pgno > commit or len(page) != page_size:
                self._check(pgno, last, len(page))
            last = pgno
            size = len(block)
            start = pack(pgno, BLOCK, size)
            crc = go_iso(page, go_iso(start, crc))
            add(start)
            add(block)
            size += 10
            add_pgno(pgno)
            add_size(size)
            written += size
        self._crc, self._last = crc, last
        self._waiting += written
        if self._waiting >= WRITE_BYTES:
            self._flush()

    def close(self) -> EncodedFile:
        """Write the end marker, the index and the trailer. Raises `FormatError` when a snapshot lacks pages."""
        header = self._header
        last = header.commit - (header.commit == self._lock)
        if header.is_snapshot and self._last != last:
            raise FormatError(f"snapshot transaction ends at page {self._last} of {header.commit}")
        self._end(END_MARKER)
        offset, index_size = LTX_HEADER_SIZE, 1
        for start in range(0, len(self._pgnos), INDEX_BATCH):
            index = frames(self._pgnos[start : start + INDEX_BATCH], self._sizes[start : start + INDEX_BATCH], offset)
            offset = index.offsets[-1] + index.sizes[-1]
            piece = encode_index(index)
            index_size += len(piece)
            self._end(piece)
        self._end(b"\0" + struct.pack(">Q", index_size) + bytes(8))
        checksum = CHECKSUM_FLAG | self._crc
        self._end(checksum.to_bytes(8, "big"))
        self._flush()
        return EncodedFile(self._written, checksum, len(self._pgnos))

    def _end(self, data: bytes) -> None:
        self._crc = go_iso(data, self._crc)
        self._parts.append(data)
        self._waiting += len(data)
        if self._waiting >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._write(b"".join(self._parts))
        self._written += self._waiting
        self._parts, self._waiting = [], 0

    def _check(self, pgno: int, last: int, size: int) -> None:
        if pgno <= 0:
            raise FormatError("page number required")
        if pgno == self._lock:
            raise FormatError(f"cannot encode lock page: pgno={pgno}")
        if pgno > self._header.commit:
            raise FormatError(f"page number {pgno} out-of-bounds for commit size {self._header.commit}")
        if pgno <= last:
            raise FormatError(f"out-of-order page numbers: {last},{pgno}")
        if size != self._page_size:
            raise FormatError(f"invalid page buffer size: {size}, expecting {self._page_size}")
        if self._header.is_snapshot and not (pgno == last + 2 and last + 1 == self._lock):
            raise FormatError("nonsequential page numbers in snapshot transaction")


def encode_file(header: Header, pages: Iterable[tuple[int, Bytes]]) -> bytes:
    """Return a whole file."""
    parts: list[bytes] = []
    encoder = Encoder(parts.append, header)
    encoder.pages(pages)
    encoder.close()
    return b"".join(parts)


class Decoder:
    """Read one file in pieces of any size, checking everything that can be checked.

    `feed` returns the pages that became complete; `close` checks the end. Nothing of a file may be trusted before `close` has returned:
    blocks carry no checksum of their own. After an error the decoder is not used any more.
    """

    def __init__(self, *, keep_blocks: bool = False) -> None:
        """`keep_blocks`: return each page's compressed block, too."""
        self.header: Header | None = None
        self._keep = keep_blocks
        self._rest = b""
        self._crc = 0
        self._last = 0
        self._lock = 0
        self._bound = 0
        self._ended = False
        self._tracked = False  # a snapshot with checksums: its post-apply checksum can be computed from its pages
        self._database_checksum = CHECKSUM_FLAG
        # Of the index that the pages call for, only a digest is kept: a file may have millions of them.
        self._count = 0
        self._pgnos, self._sizes = array("I"), array("I")
        self._index_offset = LTX_HEADER_SIZE
        self._expected, self._found, self._found_size = blake2b(), blake2b(), 0

    def feed(self, data: Bytes) -> list[DecodedPage]:
        """Return (pgno, page, block) of the pages that became complete; `block` is empty unless blocks are kept.

        Raises:
            FormatError: the bytes are not those of an LTX file.
        """
        buffer = self._rest + data if self._rest else bytes(data)
        pages: list[DecodedPage] = []
        at = 0
        if self.header is None:
            if len(buffer) < LTX_HEADER_SIZE:
                self._rest = buffer
                return pages
            self._start(buffer)
            at = LTX_HEADER_SIZE
        if not self._ended:
            at = self._pages(buffer, at, pages)
            if self._tracked:
                for pgno, page, _ in pages:
                    self._database_checksum = CHECKSUM_FLAG | (self._database_checksum ^ page_checksum(pgno, page))
        self._rest = buffer[at:]
        self._count += len(pages)
        if self._ended:
            self._index()
        elif len(self._pgnos) >= INDEX_BATCH:
            self._note_frames()
        return pages

    def _note_frames(self) -> None:
        """Write the entries of the latest pages into the digest."""
        if self._pgnos:
            index = frames(self._pgnos, self._sizes, self._index_offset)
            self._index_offset = index.offsets[-1] + index.sizes[-1]
            self._expected.update(encode_index(index))
            self._pgnos, self._sizes = array("I"), array("I")

    def _index(self) -> None:
        """Take what has come of the index, all but the last bytes, which may be size and trailer."""
        size = len(self._rest) - 8 - TRAILER_SIZE
        if size > 0:
            self._found.update(self._rest[:size])
            self._crc = go_iso(self._rest[:size], self._crc)
            self._found_size += size
            self._rest = self._rest[size:]
        if self._found_size > 30 * self._count + 1:
            raise FormatError("page index is too large")

    def close(self) -> Trailer:
        """Check index and checksums. Raises `Truncated`, `ChecksumMismatch`, `FormatError`."""
        if self.header is None:
            raise Truncated(f"invalid ltx file: {len(self._rest)} bytes, minimum {LTX_HEADER_SIZE}")
        if not self._ended:
            raise Truncated(f"decode page {self._count + 1}: EOF")
        end = self._rest
        if not self._found_size:
            raise Truncated(f"file ends inside the page index or trailer: {len(end)} bytes")
        trailer = decode_trailer(end[-TRAILER_SIZE:])
        got = CHECKSUM_FLAG | go_iso(end[:-8], self._crc)
        if got != trailer.file_checksum:
            raise ChecksumMismatch("file", expected=trailer.file_checksum, got=got)
        header = self.header
        if header.flags & NO_CHECKSUM:
            if trailer.post_apply_checksum:
                raise FormatError("post-apply checksum not allowed")
        elif not trailer.post_apply_checksum & CHECKSUM_FLAG:
            raise FormatError("post-apply checksum required")
        elif self._tracked and trailer.post_apply_checksum != self._database_checksum:
            raise ChecksumMismatch("post-apply", expected=trailer.post_apply_checksum, got=self._database_checksum)
        size = int.from_bytes(end[:8], "big")
        if size != self._found_size:
            raise FormatError(f"page index size {size}, but {self._found_size} bytes are there")
        self._note_frames()
        self._expected.update(b"\0")
        if self._found.digest() != self._expected.digest():
            raise FormatError("page index does not agree with the pages")
        last = header.commit - (header.commit == self._lock)
        if header.is_snapshot and self._last != last:
            raise FormatError(f"snapshot transaction ends at page {self._last} of {header.commit}")
        return trailer

    def _start(self, buffer: bytes) -> None:
        header = decode_header(buffer)
        header.validate()
        self._crc = go_iso(buffer[:LTX_HEADER_SIZE])
        self._lock = lock_pgno(header.page_size)
        self._tracked = header.is_snapshot and not header.flags & NO_CHECKSUM
        self._bound = header.page_size + header.page_size // 255 + 16
        self.header = header

    def _pages(self, buffer: bytes, at: int, pages: list[DecodedPage]) -> int:
        header = self.header
        assert header is not None
        decompress, page_size, bound, crc = lz4.block.decompress, header.page_size, self._bound, self._crc
        unpack, end, keep, last = _PAGE.unpack_from, len(buffer), self._keep, self._last
        lock, commit = self._lock, header.commit
        add_pgno, add_size, add = self._pgnos.append, self._sizes.append, pages.append
        try:
            # Ten bytes are there even at the end marker: index, size and trailer follow it.
            while at + 10 <= end:
                pgno, flags, size = unpack(buffer, at)
                if pgno != last + 1 or pgno == lock or pgno > commit:
                    if pgno == 0 and flags == 0:
                        crc = go_iso(END_MARKER, crc)
                        self._ended = True
                        return at + 6
                    self._check(pgno, last)
                if flags == BLOCK:
                    if size > bound:
                        raise FormatError(f"page {pgno} has a block of {size} bytes")
                    stop = at + 10 + size
                    if stop > end:
                        break
                    block = buffer[at + 10 : stop]
                    page = decompress(block, page_size)
                    crc = go_iso(page, go_iso(buffer[at : at + 10], crc))
                elif flags == 0:
                    stop = _frame_end(buffer, at + 6, bound)
                    if stop < 0:
                        break
                    block = b""
                    page = _read_frame(buffer[at + 6 : stop], page_size)
                    crc = go_iso(page, go_iso(buffer[at : at + 6], crc))
                    if keep:
                        block = lz4.block.compress(page, store_size=False)
                else:
                    raise FormatError(f"invalid page header flags: 0x{flags:04x}")
                if len(page) != page_size:
                    raise FormatError(f"page {pgno} has {len(page)} bytes, expecting {page_size}")
                add((pgno, page, block if keep else b""))
                add_pgno(pgno)
                add_size(stop - at)
                last = pgno
                at = stop
        except lz4.block.LZ4BlockError as error:
            raise FormatError(f"page {pgno} does not decompress: {error}") from error
        finally:
            self._crc, self._last = crc, last
        return at

    def _check(self, pgno: int, last: int) -> None:
        header = self.header
        assert header is not None
        if pgno == 0:
            raise FormatError("page number required")
        if pgno == self._lock:
            raise FormatError(f"cannot encode lock page: pgno={pgno}")
        if pgno > header.commit:
            raise FormatError(f"page number {pgno} out-of-bounds for commit size {header.commit}")
        if pgno <= last:
            raise FormatError(f"out-of-order page numbers: {last},{pgno}")
        if header.is_snapshot and pgno != last + 1 + (last + 1 == self._lock):
            raise FormatError("nonsequential page numbers in snapshot transaction")


def _frame_end(buffer: bytes, at: int, bound: int) -> int:
    """Return where the LZ4 frame that starts at `at` ends; -1 when it is not all there. Source: LZ4 frame format 1.6."""
    if len(buffer) < at + 7:
        return -1
    magic, flags = int.from_bytes(buffer[at : at + 4], "little"), buffer[at + 4]
    if magic != _LZ4_FRAME_MAGIC:
        raise FormatError(f"not an LZ4 frame: magic 0x{magic:08x}")
    start = at
    at += 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    while True:
        if len(buffer) < at + 4:
            return -1
        size = int.from_bytes(buffer[at : at + 4], "little") & 0x7FFFFFFF
        at += 4
        if size == 0:
            break
        at += size + (4 if flags & 0x10 else 0)
        if at - start > 2 * bound + 64:
            raise FormatError("LZ4 frame is larger than a page can be")
    at += 4 if flags & 0x04 else 0
    return at if at <= len(buffer) else -1


def _read_frame(data: bytes, page_size: int) -> bytes:
    import lz4.frame

    decompressor = lz4.frame.LZ4FrameDecompressor()
    try:
        page = bytes(decompressor.decompress(data, max_length=page_size + 1))
    except RuntimeError as error:
        raise FormatError(f"page does not decompress: {error}") from error
    if not decompressor.eof and len(page) <= page_size:
        raise FormatError("page does not decompress: incomplete LZ4 frame")
    return page


def decode_file(data: Bytes) -> tuple[Header, list[tuple[int, bytes]], Trailer]:
    """Decode a whole file and check it. Raises `FormatError`."""
    decoder = Decoder()
    pages = [(pgno, page) for pgno, page, _ in decoder.feed(data)]
    trailer = decoder.close()
    assert decoder.header is not None
    return decoder.header, pages, trailer
