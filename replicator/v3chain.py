"""Where does a stored generation of format 0.3 end, and may it be continued?

A generation is continued only when what is stored is known to be right: a snapshot is there, no index after it is missing, and the segments
of the newest index are, byte by byte, one WAL: joined without a gap, with one unbroken chain of checksums, up to a commit. Salts and
checksum at its end are then compared with the live WAL (`tail.py`). 0.3.13 looks at names only, and goes on after a hole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from replicator.errors import FormatError, Truncated
from replicator.format.v3 import FrameDecoder, Position, SegmentInfo, SnapshotInfo, V3Info
from replicator.format.wal import WAL_HEADER_SIZE, WALHeader, decode_wal_header, frame_size, scan_frames
from replicator.storage.base import ReadStream
from replicator.storage.v3 import V3Client
from replicator.tail import NO_WAL, WALPosition, start_of

__all__ = ["Stored", "Tip", "WALChain", "content_of", "newest_generation", "read_tip"]

READ_BYTES = 1 << 18

Stored = Mapping[str, Sequence[V3Info]]
"""What a replica holds: for each generation its snapshots and segments."""


@dataclass(frozen=True, slots=True)
class Tip:
    """The end of a generation.

    Attributes:
        begun: something of WAL `index` is stored.
        wal: the end of the last stored frame.
        commit: database size in pages there.
        header: of WAL `index`, when that is begun.
    """

    generation: str
    index: int
    begun: bool = False
    wal: WALPosition = NO_WAL
    commit: int = 0
    header: WALHeader | None = None

    @property
    def position(self) -> Position:
        return Position(self.generation, self.index, self.wal.offset if self.begun else 0)


class WALChain:
    """The WAL of one index, fed in pieces. Every byte must belong to the header or to a valid frame."""

    def __init__(self, after: Tip | None = None) -> None:
        """Begin with a header, or with the frame that follows a tip."""
        self.header = after.header if after else None
        self.end = after.wal if after else NO_WAL
        self.commit = after.commit if after else 0
        """Database size in pages after the last frame; 0 when that is not a commit frame."""
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Raises `FormatError` for what is no valid frame."""
        data = self._rest + data
        if self.header is None:
            if len(data) < WAL_HEADER_SIZE:
                self._rest = data
                return
            self.header = decode_wal_header(data)
            self.end = start_of(self.header)
            data = data[WAL_HEADER_SIZE:]
        page_size = self.header.page_size
        size = frame_size(page_size)
        count = len(data) // size
        found = scan_frames(
            memoryview(data)[: count * size],
            page_size=page_size,
            salts=self.end.salts,
            checksum=self.end.checksum,
            big_endian=self.header.big_endian,
        )
        if len(found) < count:
            raise FormatError(f"no valid WAL frame at offset {self.end.offset + len(found) * size}")
        if count:
            checksum = int(found.checksums[-1][0]), int(found.checksums[-1][1])
            self.end = WALPosition(self.end.salts, self.end.offset + count * size, checksum)
            self.commit = int(found.commits[-1])
        self._rest = data[count * size :]

    def end_segment(self) -> None:
        """Raises `Truncated` inside a header or a frame."""
        if self.header is None or self._rest:
            raise Truncated(f"the segment ends inside a frame, at offset {self.end.offset + len(self._rest)}")


def content_of(body: bytes | Path | ReadStream) -> Iterator[bytes]:
    """Yield the content of an LZ4 frame. Raises `FormatError`."""
    decoder = FrameDecoder()
    if isinstance(body, bytes):
        yield from decoder.feed(body)
    elif isinstance(body, Path):
        with body.open("rb") as file:
            while data := file.read(READ_BYTES):
                yield from decoder.feed(data)
    else:
        while data := body.read(READ_BYTES):
            yield from decoder.feed(data)
    decoder.close()


def newest_generation(stored: Stored) -> str | None:
    """Return the generation that a restore takes: that of the newest file."""
    times = {generation: max(info.created_ns for info in infos) for generation, infos in stored.items() if infos}
    return max(times, key=lambda generation: times[generation], default=None)


def read_tip(client: V3Client, generation: str, infos: Iterable[V3Info]) -> Tip:
    """Read the newest index of a generation from its start.

    Raises:
        FormatError: the generation is not to be continued; the text says why.
        StorageError: it cannot be read.
    """
    snapshots = [info.index for info in infos if isinstance(info, SnapshotInfo)]
    if not snapshots:
        raise FormatError(f"generation {generation} has no snapshot")
    base = max(snapshots)
    segments = sorted((info for info in infos if isinstance(info, SegmentInfo) and info.index >= base), key=lambda info: info.position)
    if not segments:
        return Tip(generation, base)
    last = segments[-1].index
    starts = {info.index for info in segments if info.offset == 0}
    for index in range(base, last + 1):
        if index not in starts:
            raise FormatError(f"generation {generation} lacks the start of WAL {index:08x}")
    chain = WALChain()
    for info in segments:
        if info.index != last:
            continue
        if info.offset != chain.end.offset:
            raise FormatError(f"generation {generation} has a gap before {info.name}")
        with client.open(info) as stream:
            for piece in content_of(stream):
                chain.feed(piece)
        chain.end_segment()
    if not chain.commit or chain.header is None:
        raise FormatError(f"generation {generation} ends inside a transaction")
    return Tip(generation, last, True, chain.end, chain.commit, chain.header)
