"""Litestream 0.3: names in a replica, positions, and the LZ4 frame that every file is.

Below the replica's path:

| name | content, inside one LZ4 frame |
|---|---|
| `generations/<generation>/snapshots/<index>.snapshot.lz4` | the database file |
| `generations/<generation>/wal/<index>_<offset>.wal.lz4` | bytes of WAL file `index` from `offset` on |

The generation is 16 hex digits and names an unbroken history; the index counts WAL files in it, 8 hex digits; the offset is a byte offset in the
uncompressed WAL, 8 to 16 hex digits, only as many as it needs. All lower case. Times are not in the files: they are when the store got them.

An LZ4 frame: magic `04 22 4d 18`; `64` (version 01, independent blocks, content checksum, no block checksums, no content size); `70`
(blocks of 4 MiB); `b9` (header checksum). Blocks follow, a zero size, and the XXH32 of the content. That is what is written; any frame is read.

What a WAL holds is in `wal.py`.

Source: specification of 0.3, sections 1 to 6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from replicator.errors import FormatError, Truncated

__all__ = [
    "GENERATIONS",
    "MAX_INDEX",
    "EncryptedFrame",
    "FrameDecoder",
    "FrameEncoder",
    "Position",
    "SegmentInfo",
    "SnapshotInfo",
    "V3Info",
    "encode_frame",
    "format_index",
    "generation_folder",
    "is_generation",
    "parse_index",
    "parse_position",
    "parse_segment_name",
    "parse_snapshot_name",
    "segment_name",
    "segments_folder",
    "snapshot_name",
    "snapshots_folder",
    "time_of",
    "time_text",
]

GENERATIONS = "generations"
MAX_INDEX = 0x7FFFFFFF
"""The last index that a writer uses; then a new generation begins."""

MAGIC = b"\x04\x22\x4d\x18"
BLOCK_BYTES = 4 << 20
_AGE = b"age-encryption.org/"

_GENERATION = re.compile(r"[0-9a-f]{16}")
_INDEX = re.compile(r"[0-9a-fA-F]{1,8}")
_SNAPSHOT = re.compile(r"([0-9a-f]{8})\.snapshot\.lz4")
_SEGMENT = re.compile(r"([0-9a-f]{8})_([0-9a-f]{8,16})\.wal\.lz4")
_POSITION = re.compile(r"([0-9a-f]{16})/([0-9a-f]{8}):([0-9]{1,19})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# -- names ---------------------------------------------------------------------------------------------------------------------------


def is_generation(name: str) -> bool:
    """True for exactly 16 lower-case hex digits."""
    return _GENERATION.fullmatch(name) is not None


def format_index(index: int) -> str:
    """Return an index as names have it."""
    return f"{index:08x}"


def parse_index(text: str) -> int:
    """Read an index as `-index` takes it: hex digits without `0x`. Raises `FormatError`."""
    if not _INDEX.fullmatch(text):
        raise FormatError(f"not an index: {text!r} (1 to 8 hex digits)")
    return int(text, 16)


def generation_folder(generation: str) -> str:
    """Return the folder of a generation. Raises `ValueError` for what is no generation: it becomes a path."""
    if not is_generation(generation):
        raise ValueError(f"not a generation: {generation!r}")
    return f"{GENERATIONS}/{generation}"


def snapshots_folder(generation: str) -> str:
    """Return where a generation's snapshots lie."""
    return f"{generation_folder(generation)}/snapshots"


def segments_folder(generation: str) -> str:
    """Return where a generation's WAL segments lie."""
    return f"{generation_folder(generation)}/wal"


def snapshot_name(index: int) -> str:
    """Return a snapshot's name without folder."""
    return f"{index:08x}.snapshot.lz4"


def parse_snapshot_name(name: str) -> int | None:
    """Return the index, or None for what is no snapshot's name."""
    found = _SNAPSHOT.fullmatch(name)
    return int(found[1], 16) if found else None


def segment_name(index: int, offset: int) -> str:
    """Return a segment's name without folder. 0.3.13 itself reads back only names with 8 digits of offset, which end at 4 GiB."""
    return f"{index:08x}_{offset:08x}.wal.lz4"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """Return index and offset, or None for what is no segment's name. More digits than the offset needs are no name: nobody writes them."""
    found = _SEGMENT.fullmatch(name)
    if not found:
        return None
    index, offset = int(found[1], 16), int(found[2], 16)
    return (index, offset) if segment_name(index, offset) == name else None


# -- values --------------------------------------------------------------------------------------------------------------------------


def time_of(created_ns: int) -> datetime:
    """Return nanoseconds since 1970 as a time point, cut to microseconds. What lies outside the calendar becomes its nearest end."""
    try:
        return _EPOCH + timedelta(microseconds=created_ns // 1000)
    except OverflowError:
        return (datetime.max if created_ns > 0 else datetime.min).replace(tzinfo=UTC)


def time_text(created_ns: int) -> str:
    """Return nanoseconds since 1970 as RFC 3339 in UTC, with all digits that count."""
    fraction = f"{created_ns % 1_000_000_000:09d}".rstrip("0")
    return time_of(created_ns).strftime("%Y-%m-%dT%H:%M:%S") + (f".{fraction}Z" if fraction else "Z")


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a generation. The order is meaningful within one generation only: their names are random."""

    generation: str
    index: int
    offset: int

    def __str__(self) -> str:
        return f"{self.generation}/{self.index:08x}:{self.offset}"


def parse_position(text: str) -> Position:
    """Read what `str` of a position gives. Raises `FormatError`."""
    found = _POSITION.fullmatch(text)
    if not found:
        raise FormatError(f"not a position: {text!r} (generation/index:offset)")
    return Position(found[1], int(found[2], 16), int(found[3]))


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A stored snapshot. `size`: stored bytes, compressed. `created_ns`: when the store got it, nanoseconds since 1970."""

    generation: str
    index: int
    size: int
    created_ns: int

    @property
    def name(self) -> str:
        """The name below the replica's path."""
        return f"{snapshots_folder(self.generation)}/{snapshot_name(self.index)}"

    @property
    def created_at(self) -> datetime:
        return time_of(self.created_ns)


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A stored WAL segment. `offset`: in the uncompressed WAL; `size` and `created_ns` as in `SnapshotInfo`."""

    generation: str
    index: int
    offset: int
    size: int
    created_ns: int

    @property
    def name(self) -> str:
        """The name below the replica's path."""
        return f"{segments_folder(self.generation)}/{segment_name(self.index, self.offset)}"

    @property
    def position(self) -> Position:
        return Position(self.generation, self.index, self.offset)

    @property
    def created_at(self) -> datetime:
        return time_of(self.created_ns)


V3Info = SnapshotInfo | SegmentInfo


# -- the LZ4 frame -------------------------------------------------------------------------------------------------------------------


class FrameEncoder:
    """One LZ4 frame, piece by piece: `feed` the content, then `close`. The pieces that come out, put together, are the file."""

    def __init__(self) -> None:
        import lz4.frame

        # Not the one-shot function: it would choose smaller blocks for small inputs, and another header.
        self._compressor: Any = lz4.frame.LZ4FrameCompressor(
            block_size=lz4.frame.BLOCKSIZE_MAX4MB, block_linked=False, content_checksum=True
        )
        self._start: bytes = self._compressor.begin()

    def feed(self, data: bytes | memoryview) -> bytes:
        """Add content; return what became ready, often nothing: a block is 4 MiB."""
        start, self._start = self._start, b""
        return start + bytes(self._compressor.compress(data)) if len(data) else start

    def close(self) -> bytes:
        """Return the rest of the frame."""
        start, self._start = self._start, b""
        return start + bytes(self._compressor.flush())


def encode_frame(data: bytes | memoryview) -> bytes:
    """Return one complete frame."""
    encoder = FrameEncoder()
    return encoder.feed(data) + encoder.close()


class EncryptedFrame(FormatError):
    """Not an LZ4 frame but one that age has encrypted."""

    def __init__(self) -> None:
        super().__init__("encrypted with age")


class FrameDecoder:
    """Exactly one LZ4 frame, of any options. Its checksums are verified.

    Args:
        piece_bytes: no piece of content is larger, however well it was compressed: memory stays bounded.
        max_bytes: more content than this is a `FormatError`.
    """

    def __init__(self, *, piece_bytes: int = 1 << 20, max_bytes: int | None = None) -> None:
        import lz4.frame

        self._decompressor: Any = lz4.frame.LZ4FrameDecompressor()
        self._piece_bytes, self._rest = piece_bytes, max_bytes
        self._start = b""
        self._begun = False

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield the content that became complete. To be used up before the next call.

        Raises:
            FormatError: not a frame, a wrong checksum, or bytes after the frame.
        """
        if not self._begun:
            self._start += bytes(data)
            if len(self._start) < len(MAGIC) and MAGIC.startswith(self._start):
                return
            if not self._start.startswith(MAGIC):
                raise EncryptedFrame if self._start.startswith(_AGE[: len(self._start)]) else FormatError("not an LZ4 frame")
            data, self._start, self._begun = self._start, b"", True
        elif self._decompressor.eof and len(data):
            raise FormatError("bytes after the end of the LZ4 frame")
        while len(data) or not (self._decompressor.needs_input or self._decompressor.eof):
            piece = self._decompress(data)
            data = b""
            if self._rest is not None:
                self._rest -= len(piece)
                if self._rest < 0:
                    raise FormatError("the LZ4 frame holds more than it may")
            if piece:
                yield piece
        if self._decompressor.eof and self._decompressor.unused_data:
            raise FormatError("bytes after the end of the LZ4 frame")

    def close(self) -> None:
        """Check that the frame is complete. Raises `Truncated`."""
        if not self._decompressor.eof:
            raise Truncated("the LZ4 frame ends too early")

    def _decompress(self, data: bytes | memoryview) -> bytes:
        try:
            return bytes(self._decompressor.decompress(data, self._piece_bytes))
        except RuntimeError as error:  # what the library raises for every damage; the name of the reason ends the text
            raise FormatError(f"damaged LZ4 frame ({str(error).rpartition(' ')[2]})") from error
