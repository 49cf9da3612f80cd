"""Read committed frames from the `-wal` file. The file carries no locks, so it is opened and closed freely.

Nothing here decides anything: `tail.py` says where to start, `db.py` holds the locks that keep the frames where they are.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.atomic import sync_data
from replicator.errors import FormatError
from replicator.format.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    FrameHeader,
    WALHeader,
    decode_frame_header,
    decode_wal_header,
    frame_size,
    newest_frames,
    scan_frames,
)
from replicator.tail import WALPosition

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Changes", "WALFile", "joined"]

FIRST_READ, FIRST_READ_MOST = 1 << 16, 1 << 20
NEXT_READ = 4 << 20
READ_GROWTH = 4
KEEP_BYTES = 16 << 20
SALTS_AT = 8
_SALTS = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Changes:
    """The committed frames of one stretch of the WAL, as the newest image of each page.

    Attributes:
        start, end: positions before the first and after the last frame, which is a commit frame.
        commit: database size in pages after it.
        frames: number of frames, duplicates included.
        pgnos: distinct page numbers in ascending order, none beyond `commit`.
        offsets: byte offset of each page's image in the WAL.
        more: valid frames may follow; reading stopped because of the limit.
        data: the bytes from `start.offset` on, when they are few; None otherwise.
        places: where the images are in `data`, when it holds nothing else (see `packed`).
    """

    start: WALPosition
    end: WALPosition
    page_size: int
    commit: int
    frames: int
    pgnos: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    more: bool
    data: bytes | None
    places: NDArray[np.int64] | None = None

    def pages(self, wal: WALFile) -> Iterator[tuple[int, bytes]]:
        """Yield (pgno, image) in ascending order."""
        if self.data is not None:
            yield from self.kept_pages()
            return
        for pgno, offset in zip(self.pgnos.tolist(), self.offsets.tolist(), strict=True):
            yield pgno, wal.page(offset, self.page_size)

    def kept_pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield the same from `data`, without the WAL."""
        assert self.data is not None
        size, data = self.page_size, self.data
        for pgno, at in zip(self.pgnos.tolist(), self._places().tolist(), strict=True):
            yield pgno, data[at : at + size]

    def packed(self) -> Changes:
        """Return the same without what is not the newest image of a page."""
        return joined([self], pack=True)

    def _places(self) -> NDArray[np.int64]:
        return self.offsets - self.start.offset if self.places is None else self.places


def joined(parts: Sequence[Changes], *, pack: bool) -> Changes:
    """Return stretches that follow each other as one; all have their `data`. `pack`: keep only the newest image of each page, not all frames."""
    import numpy as np

    first, last = parts[0], parts[-1]
    assert all(a.end == b.start for a, b in itertools.pairwise(parts))
    if len(parts) == 1 and not pack:
        return first
    distinct, index = newest_frames(np.concatenate([part.pgnos for part in parts]), last.commit)
    offsets = np.concatenate([part.offsets for part in parts])[index]
    places: NDArray[np.int64] | None = None
    if pack:
        views = [memoryview(part.data or b"") for part in parts]
        images = [view[at : at + first.page_size] for view, part in zip(views, parts, strict=True) for at in part._places().tolist()]
        data = b"".join([images[number] for number in index.tolist()])
        places = np.arange(len(index), dtype=np.int64) * first.page_size
    else:
        data = b"".join([memoryview(part.data or b"")[: part.end.offset - part.start.offset] for part in parts])
    frames = sum(part.frames for part in parts)
    return Changes(first.start, last.end, first.page_size, last.commit, frames, distinct, offsets, last.more, data, places)


class WALFile:
    """The `-wal` file of one database, opened for reading. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `FileNotFoundError`."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._header: tuple[bytes, WALHeader | None] = b"", None  # as it was read last
        try:
            status = os.fstat(self._file)
        except BaseException:
            os.close(self._file)
            raise
        self.identity = status.st_dev, status.st_ino
        self.wrong_frame = False
        """Whether `changes` stopped at a frame that carries the WAL's salts, but not the right checksum."""
        self._found_bytes = 0
        """How much `changes` found lately: the next one will find about as much, or nothing, when it comes early."""

    def __enter__(self) -> WALFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; once."""
        os.close(self._file)

    def flush(self) -> None:
        """Make what is written durable, so that the checkpoint that must do it has little left. Raises `OSError`."""
        sync_data(self._file)

    def header(self) -> WALHeader | None:
        """Return the header; None when it is missing, short or torn."""
        data = os.pread(self._file, WAL_HEADER_SIZE, 0)
        if data != self._header[0]:
            try:
                self._header = data, decode_wal_header(data)
            except FormatError:
                self._header = data, None
        return self._header[1]

    def frame_header(self, offset: int) -> FrameHeader | None:
        """Return the header of the frame that starts at a byte offset; None when it is not all there."""
        data = os.pread(self._file, FRAME_HEADER_SIZE, offset)
        return decode_frame_header(data) if len(data) == FRAME_HEADER_SIZE else None

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from a byte offset on."""
        return os.pread(self._file, size, offset)

    def page(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes of the page image at a byte offset.

        Raises:
            FormatError: the file is shorter: somebody truncated it.
        """
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise FormatError(f"the WAL ends inside the page at offset {offset}")
        return data

    def changes(
        self,
        position: WALPosition,
        *,
        page_size: int,
        big_endian: bool,
        limit: int | None = None,
        stop_at: int | None = None,
        keep: bool = True,
    ) -> Changes | None:
        """Read committed frames from `position`; None when there are none.

        Args:
            limit: stop at the first commit frame at or after so many bytes; a larger transaction is taken whole.
            stop_at: do not look at frames from this offset on.
            keep: keep the bytes, when they are few.
        """
        import numpy as np

        size = frame_size(page_size)
        parts: list[tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]] = []
        kept: list[bytes] | None = [] if keep else None
        kept_bytes = 0
        checksum, offset, frames, committed = position.checksum, position.offset, 0, 0
        # A quarter more than the last time, and in one read: pieces would be put together.
        want = max(min(max(FIRST_READ, self._found_bytes + self._found_bytes // 4), FIRST_READ_MOST) // size, 1) * size
        more = False
        while True:
            if stop_at is not None:
                want = min(want, stop_at - offset)
            data, valid = os.pread(self._file, want, offset) if want > 0 else b"", 0
            if len(data) < size or _SALTS.unpack_from(data, SALTS_AT) != position.salts:
                break  # what most looks find; the arrays below cost more than all the rest
            found = scan_frames(data, page_size=page_size, salts=position.salts, checksum=checksum, big_endian=big_endian)
            if not len(found):
                break
            valid = len(found) * size
            parts.append((found.pgnos, found.commits, found.checksums))
            if kept is not None:
                kept_bytes += valid
                if kept_bytes > KEEP_BYTES:
                    kept = None
                else:
                    kept.append(data)
            last = found.committed()
            if last:
                committed = frames + last
            frames += len(found)
            offset += valid
            checksum = (int(found.checksums[-1][0]), int(found.checksums[-1][1]))
            if valid < len(data) or len(data) < want:
                break
            if limit is not None and committed * size >= limit:
                more = True
                break
            # Little by little: behind the end of a WAL that was restarted lie the frames of the old one, and they would be read for nothing.
            want = max(min(READ_GROWTH * want, NEXT_READ) // size, 1) * size
        # As it was read, and not as it is by now: a frame that a writer has added meanwhile is none.
        following = decode_frame_header(data, valid) if not more and len(data) - valid >= FRAME_HEADER_SIZE else None
        self.wrong_frame = following is not None and (following.salt1, following.salt2) == position.salts and following.pgno != 0
        self._found_bytes = max(committed * size, self._found_bytes // 2)
        if not committed:
            return None
        pgnos, commits, checksums = parts[0] if len(parts) == 1 else (np.concatenate([part[i] for part in parts]) for i in range(3))
        pgnos, commits, checksums = pgnos[:committed], commits[:committed], checksums[:committed]
        commit = int(commits[-1])
        distinct, index = newest_frames(pgnos, commit)
        end = WALPosition(position.salts, position.offset + committed * size, (int(checksums[-1][0]), int(checksums[-1][1])))
        offsets = index.astype(np.int64) * size + (position.offset + FRAME_HEADER_SIZE)
        raw = None
        if kept is not None:
            raw = kept[0] if len(kept) == 1 else b"".join(kept)
        return Changes(position, end, page_size, commit, committed, distinct, offsets, more, raw)
