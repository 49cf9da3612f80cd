"""Put a 0.3 snapshot and WAL segments into a file, page by page, as SQLite's checkpoint would, and verify everything on the way.

What is checked: the checksums of each LZ4 frame; that a segment begins where the one before it ended; the WAL's header; that no two indexes are the
same WAL; the salts and the chain of checksums of all frames of an index, across its segments; that an index which is followed by another one ends with a commit. SQLite itself
stops at the first frame that is wrong and says nothing, so a hole restores to a database of mixed ages: here it is an error with the name.

What cannot be seen: that the last segments of an index are gone when what remains ends with a commit, and a later index follows. Nothing in
the format says how long an index was.

One index after the other: committed pages are written at their places at once; frames after the last commit wait, in memory or in an unnamed file.
The file is cut to the size of the last commit only at the end of an index, not at each commit: a checkpoint takes the newest frame of each page
wherever it is in the WAL, so a page that was cut off and is inside again has its old image. Bytes are then those of the released binary.

Source: specification of 0.3, sections 4 to 6, 11.5 and 18.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from replicator.errors import CorruptReplica, FormatError, MissingSegment, WrongKey
from replicator.format.sqlite import DATABASE_HEADER_SIZE, decode_database_header
from replicator.format.v3 import EncryptedFrame, FrameDecoder, SegmentInfo, SnapshotInfo
from replicator.format.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    Frames,
    WALHeader,
    decode_frame_header,
    decode_wal_header,
    newest_frames,
    scan_frames,
)
from replicator.tail import NO_WAL, WALPosition, start_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Replay", "Replayed", "decompressed"]

WAITING_BYTES = 16 << 20
BATCH_BYTES = 1 << 20


def decompressed(name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of one stored file in pieces of at most a mebibyte. Raises `CorruptReplica`, and `WrongKey` for what is encrypted."""
    decoder = FrameDecoder()
    try:
        for piece in pieces:
            yield from decoder.feed(piece)
        decoder.close()
    except EncryptedFrame as error:
        raise WrongKey(name) from error
    except FormatError as error:
        raise CorruptReplica(name, str(error)) from error


@dataclass(frozen=True, slots=True)
class Replayed:
    """The state that a file has: its size in pages, and the end of the last committed frame, in the WAL of `index`; no WAL when none has begun."""

    page_size: int
    commit: int
    index: int
    wal: WALPosition


class Replay:
    """A file in which a database comes to be. `file` is its descriptor, for positioned writes; it begins empty.

    Args:
        url: of the replica, for messages.
        folder: where frames wait that are not committed yet and too many for memory.
        changed: told the page numbers of each batch that was written, ascending.
    """

    def __init__(self, file: int, url: str, *, folder: Path, changed: Callable[[NDArray[np.uint32]], None] | None = None) -> None:
        self._file, self._url, self._changed = file, url, changed
        self._waiting: IO[bytes] = tempfile.SpooledTemporaryFile(WAITING_BYTES, dir=os.fspath(folder))  # noqa: SIM115  closed by close
        self._wal: _WAL | None = None
        self._rest = b""
        self._next_index = 0
        self._end = NO_WAL
        self._salts: set[tuple[int, int]] = set()
        self.page_size = 0
        self.commit = 0
        """Size of the database in pages, as of the last commit."""

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.close()

    def snapshot(self, info: SnapshotInfo, pieces: Iterable[bytes]) -> None:
        """Write a snapshot from its stored bytes.

        Raises:
            CorruptReplica: it is no LZ4 frame, or holds no database.
        """
        name = self._name(info)
        self._next_index = info.index
        at, start = 0, b""
        for data in decompressed(name, pieces):
            start += data[: DATABASE_HEADER_SIZE - len(start)] if len(start) < DATABASE_HEADER_SIZE else b""
            self._write(at, data)
            at += len(data)
        if at:  # an empty one is a database that is all in its WAL
            try:
                self.page_size = decode_database_header(start).page_size
            except FormatError as error:
                raise CorruptReplica(name, str(error)) from error
            if at % self.page_size:
                raise CorruptReplica(name, f"{at} bytes are not whole pages of {self.page_size}")
            self.commit = at // self.page_size

    def segment(self, info: SegmentInfo, pieces: Iterable[bytes]) -> None:
        """Apply a segment from its stored bytes. Those of an index come in order of offset, and indexes in order.

        Raises:
            MissingSegment: this is not the one that follows.
            CorruptReplica: it fails a check.
        """
        name = self._name(info)
        if self._wal is None or info.index != self._wal.index:
            self._end_index()
            if info.offset or info.index != self._next_index:
                raise MissingSegment(self._segment_name(info.generation, self._next_index, 0), "the beginning of a WAL file")
            self._next_index = info.index + 1
            self._wal = _WAL(info.generation, info.index)
        wal = self._wal
        if info.offset > wal.offset:
            raise MissingSegment(
                self._segment_name(info.generation, info.index, wal.offset), f"the next one that is stored begins at {info.offset:08x}"
            )
        if info.offset < wal.offset:
            raise CorruptReplica(name, f"it begins inside the segment before it, which ends at {wal.offset:08x}")
        size = 0
        try:
            for data in decompressed(name, pieces):
                size += len(data)
                wal.offset += len(data)
                self._rest += data
                self._consume(wal)
        except FormatError as error:
            raise CorruptReplica(name, str(error)) from error
        if not size:
            raise CorruptReplica(name, "it holds nothing")

    def finish(self) -> Replayed:
        """Bring the file to its final size, and return its state. An unfinished transaction at the end is dropped, as SQLite does.

        Raises:
            CorruptReplica: nothing was stored, or the WAL ends inside a frame.
        """
        if self._rest:
            assert self._wal is not None
            raise MissingSegment(self._here(self._wal), "the WAL ends inside a frame")
        self._trim()
        if not self.commit:
            raise CorruptReplica(self._url, "there is no committed state")
        return Replayed(self.page_size, self.commit, self._next_index if self._wal is None else self._wal.index, self._end)

    def _end_index(self) -> None:
        """Check that the WAL file is complete, as far as can be known, before the next one begins."""
        wal = self._wal
        if wal is not None and (self._rest or wal.header is None):
            raise MissingSegment(self._here(wal), "the WAL ends inside a frame, and another one follows")
        if wal is not None and wal.waiting:
            raise MissingSegment(self._here(wal), "the WAL ends inside a transaction, and another one follows")
        self._trim()

    def _trim(self) -> None:
        os.ftruncate(self._file, self.commit * self.page_size)

    def _consume(self, wal: _WAL) -> None:
        if wal.header is None:
            if len(self._rest) < WAL_HEADER_SIZE:
                return
            wal.begin(decode_wal_header(self._rest))
            assert wal.header is not None
            if self.page_size not in (0, wal.header.page_size):
                raise FormatError(f"page size {wal.header.page_size}, the database has {self.page_size}")
            salts = wal.header.salt1, wal.header.salt2
            if salts in self._salts:  # SQLite changes them at each restart
                raise FormatError("the WAL of an earlier index again")
            self._salts.add(salts)
            self._end = start_of(wal.header)
            self.page_size = wal.header.page_size
            self._rest = self._rest[WAL_HEADER_SIZE:]
        size = FRAME_HEADER_SIZE + self.page_size
        if len(self._rest) < size:
            return
        whole = len(self._rest) // size * size
        data, self._rest = self._rest[:whole], self._rest[whole:]
        frames = wal.scan(data)
        count = whole // size
        if len(frames) < count:
            raise FormatError(wal.why(data, len(frames), wal.offset - len(self._rest) - whole))
        committed = frames.committed()
        if committed:
            self._apply_waiting(wal)
            self._apply(data, frames.pgnos[:committed])
            self.commit = int(frames.commits[committed - 1])
            start = wal.offset - len(self._rest) - whole
            s0, s1 = frames.checksums[committed - 1].tolist()
            self._end = WALPosition(self._end.salts, start + committed * size, (s0, s1))
        if committed < count:
            self._waiting.write(data[committed * size :])
            wal.waiting += count - committed

    def _apply_waiting(self, wal: _WAL) -> None:
        if not wal.waiting:
            return
        import numpy as np

        size = FRAME_HEADER_SIZE + self.page_size
        self._waiting.seek(0)
        while data := self._waiting.read(max(1, BATCH_BYTES // size) * size):
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
            self._apply(data, np.ascontiguousarray(rows[:, :4]).view(">u4").astype(np.uint32)[:, 0])
        self._waiting.seek(0)
        self._waiting.truncate()
        wal.waiting = 0

    def _apply(self, data: bytes, pgnos: NDArray[np.uint32]) -> None:
        """Write the newest of the frames of each page, neighbours together."""
        distinct, indexes = newest_frames(pgnos, 0xFFFFFFFF)
        size, view = FRAME_HEADER_SIZE + self.page_size, memoryview(data)
        run: list[memoryview] = []
        first = 0
        for pgno, index in zip(distinct.tolist(), indexes.tolist(), strict=True):
            if pgno != first + len(run):
                self._write((first - 1) * self.page_size, b"".join(run))
                run, first = [], pgno
            run.append(view[index * size + FRAME_HEADER_SIZE : (index + 1) * size])
        self._write((first - 1) * self.page_size, b"".join(run))
        if self._changed is not None:
            self._changed(distinct)

    def _write(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, at)
            view, at = view[done:], at + done

    def _name(self, info: SnapshotInfo | SegmentInfo) -> str:
        return f"{self._url} {info.name}"

    def _here(self, wal: _WAL) -> str:
        """Name the segment that would come next."""
        return self._segment_name(wal.generation, wal.index, wal.offset)

    def _segment_name(self, generation: str, index: int, offset: int) -> str:
        return self._name(SegmentInfo(generation, index, offset, 0, 0))


class _WAL:
    """The WAL file of one index. `offset`: bytes that came; `waiting`: frames after the last commit."""

    def __init__(self, generation: str, index: int) -> None:
        self.generation, self.index = generation, index
        self.offset = self.waiting = 0
        self.header: WALHeader | None = None
        self._sums = (0, 0)

    def begin(self, header: WALHeader) -> None:
        self.header, self._sums = header, (header.checksum1, header.checksum2)

    def scan(self, data: bytes) -> Frames:
        """Return the valid frames that `data` begins with, and go on after them."""
        header = self.header
        assert header is not None
        frames = scan_frames(
            data, page_size=header.page_size, salts=(header.salt1, header.salt2), checksum=self._sums, big_endian=header.big_endian
        )
        if len(frames):
            self._sums = (int(frames.checksums[-1, 0]), int(frames.checksums[-1, 1]))
        return frames

    def why(self, data: bytes, bad: int, start: int) -> str:
        """Say what is wrong with frame `bad` of `data`, which begins at offset `start` of the WAL."""
        header = self.header
        assert header is not None
        at = bad * (FRAME_HEADER_SIZE + header.page_size)
        frame = decode_frame_header(data, at)
        if (frame.salt1, frame.salt2) != (header.salt1, header.salt2):
            what = "has the salts of another WAL"
        elif frame.pgno == 0:
            what = "has no page number"
        else:
            what = "does not continue the chain of checksums"
        return f"frame at offset {start + at:08x} {what}"
