"""Turn a 0.3 replica into an LTX replica whose old moments stay restorable.

The history is walked once, from the oldest moment that can be restored to the newest (`v3plan.timeline`). Each step is a TXID:

* a 0.3 snapshot becomes a file of level 9, the full image that a restore of its time gives, unless nothing changed since the one before. Where
  it differs from what came before, as at the beginning of another generation, the pages that differ are a file of level 0;
* a WAL segment becomes a file of level 0 with the pages of the transactions that it finishes; none when it finishes none.

**Times.** A restore of 0.3 data includes files of exactly the asked time, one of LTX files does not, and LTX times are whole milliseconds. So a
file gets the last millisecond before its segment's time: for every time in whole milliseconds both restore the same bytes, and for the times of the
segments themselves, too, unless two lie in one millisecond. One small file of level 1, a copy of the last one, carries the time of the newest
segment, so that it, too, lies inside the times that can be asked for.

**A note** in the destination, `pyrepl/convert.json`, says that it is being filled and from where. With it a stopped run is taken up again: the
files are the same bytes each time, so what is there is compared and not sent again. It is deleted at the end. Without a note, a destination that
holds anything is refused.

In memory are the numbers of the pages that a step changes; on disk two images of the database at most.

Source: specification of 0.3, sections 6 and 11; of 0.5, sections 1, 2.2 and 2.4.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.chain import Progress, list_files
from replicator.errors import ConfigError, NoBackups, ObjectNotFound, PreconditionFailed, ReplicaStateError, SnapshotNotAvailable
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo, Header
from replicator.format.sqlite import lock_pgno
from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info, time_of
from replicator.outbox import OutFile, Staging, encode
from replicator.replay import Replay
from replicator.storage.base import Comparing, ReplicaClient
from replicator.storage.v3 import v3_client
from replicator.v3plan import Step, timeline
from replicator.v3restore import list_generations, stored_pieces

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Converted", "convert"]

NOTE = "pyrepl/convert.json"
CHUNK_BYTES = 1 << 20
MILLISECOND = 1_000_000

log = logging.getLogger(__name__)

Pieces = Iterator[tuple[V3Info, Iterable[bytes]]]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made: the last TXID, files and bytes written, and the first and the last moment that can be restored."""

    txid: TXID
    snapshots: int
    files: int
    bytes_written: int
    oldest: datetime
    newest: datetime
    duration_s: float


def convert(
    source: ReplicaClient,
    target: ReplicaClient,
    *,
    generation: str | None = None,
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
    folder: Path | None = None,
) -> Converted:
    """Fill `target`, which must be empty, with the history of the 0.3 replica at `source`, which is not changed.

    Args:
        generation: of this one only; otherwise all of them, one after the other.
        parallelism: small files that are read at once.
        folder: for two images of the database; the system's folder for temporary files when None.

    Raises:
        NoBackups, GenerationNotAvailable, SnapshotNotAvailable: there is nothing to convert.
        CorruptReplica, MissingSegment: a file of the source is damaged or missing; it is named. The target keeps the note, and no end.
        ReplicaStateError: the target holds something else.
    """
    started = time.monotonic()
    v3 = v3_client(source)
    if v3 is None:
        raise ConfigError(f"no generations of the 0.3 format can be read from {source.url}")
    generations = list_generations(v3, only=generation)
    if not generations:
        raise NoBackups(source.url)
    steps = timeline(generations)
    if not steps:
        raise SnapshotNotAvailable(generations[0].name, "none is stored")
    note = json.dumps({"source": source.url, "generation": generation or ""}).encode()
    resuming = _claim(target, note)
    newest_ns = max(item.newest_ns for item in generations)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyrepl-convert-", dir=folder)))
        writer = _Writer(target, Staging(scratch / "staged", limit_bytes=1 << 62), resuming=resuming)
        pieces = stack.enter_context(
            closing(stored_pieces(v3, [info for step in steps for info in step.files], parallelism=parallelism, progress=progress))
        )
        states = stack.enter_context(_States(source.url, scratch))
        for step in steps:
            states.take(step, pieces, writer)
        states.close_history(newest_ns, writer)
    target.delete_control(NOTE)
    oldest, newest = time_of(steps[0].time_ns), time_of(newest_ns)
    return Converted(writer.txid, writer.snapshots, writer.files, writer.bytes, oldest, newest, time.monotonic() - started)


def _claim(target: ReplicaClient, note: bytes) -> bool:
    """Leave the note in an empty target. True when it is there already: this goes on with what was begun."""
    try:
        found = target.get_control(NOTE).data
    except ObjectNotFound:
        found = None
    if found == note:
        return True
    if found is not None or any(list_files(target).values()):
        what = "another conversion was begun there" if found is not None else "it holds files"
        raise ReplicaStateError(f"destination is not empty: {target.url} ({what})", hint="convert into a new, empty path")
    try:
        target.put_control(NOTE, note, if_absent=True)
    except PreconditionFailed:
        raise ReplicaStateError(f"destination is not empty: {target.url} (another conversion was begun there)") from None
    return False


class _Writer:
    """Sends files with ascending TXIDs, each at once."""

    def __init__(self, target: ReplicaClient, staging: Staging, *, resuming: bool) -> None:
        self._target, self._staging, self._resuming = target, staging, resuming
        self.txid = TXID(0)
        self.snapshots = self.files = self.bytes = 0

    def put(self, level: int, header: Header, pages: Iterable[tuple[int, bytes]]) -> None:
        out, _ = encode(self._staging, level, header, pages, unique=True)
        try:
            self._send(out)
        finally:
            if isinstance(out.body, Path):
                out.body.unlink(missing_ok=True)
        self.snapshots += level == SNAPSHOT_LEVEL
        self.files += 1
        log.debug("file written level=%d min_txid=%016x max_txid=%016x", level, header.min_txid, header.max_txid)

    def _send(self, out: OutFile) -> None:
        self.bytes += out.body.stat().st_size if isinstance(out.body, Path) else len(out.body)
        try:
            self._target.put(out.level, out.min_txid, out.max_txid, out.body, timestamp_ms=out.timestamp_ms, if_absent=True)
        except PreconditionFailed:
            info = FileInfo(out.level, out.min_txid, out.max_txid, 0, time_of(out.timestamp_ms * MILLISECOND))
            if not self._resuming or not _holds(self._target, info, out.body):
                raise ReplicaStateError(
                    f"destination holds another file: {self._target.url} level {info.level} {info.name}",
                    hint="the source has changed since the conversion was begun; convert into a new, empty path",
                ) from None


class _States:
    """The database as it was, step by step, in a file without a name. A context manager."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._image: _Image | None = None
        self._last: tuple[Header, list[int] | None] | None = None
        self._imaged = TXID(0)

    def __enter__(self) -> _States:
        return self

    def __exit__(self, *_: object) -> None:
        if self._image is not None:
            self._image.close()

    def take(self, step: Step, pieces: Pieces, writer: _Writer) -> None:
        """Bring the image to the state of a step, and write the files of it."""
        timestamp_ms = -(-step.time_ns // MILLISECOND) - 1
        if step.snapshot is not None:
            self._begin(len(step.segments), pieces, timestamp_ms, writer)
            return
        assert self._image is not None
        for _ in step.segments:
            before = self._image.commit
            changed = self._image.apply(pieces)
            if changed:
                self._write_changes({*changed, *range(before + 1, self._image.commit + 1)}, timestamp_ms, writer)

    def _begin(self, segments: int, pieces: Pieces, timestamp_ms: int, writer: _Writer) -> None:
        """Begin with a snapshot, and the segments of its time."""
        image, old = _Image(self._url, self._folder), self._image
        self._image = image
        try:
            for _ in range(1 + segments):
                image.apply(pieces)
            if not image.commit:
                raise SnapshotNotAvailable(self._url, "a snapshot without a committed state")
            if old is None:
                writer.txid = TXID(1)
                self._last = self._header(timestamp_ms, TXID(1), TXID(1)), None
            elif differing := old.differing(image):
                self._write_changes(differing, timestamp_ms, writer)
        finally:
            if old is not None:
                old.close()
        if writer.txid > self._imaged:  # a snapshot of what did not change since the last one has its name, and adds nothing
            writer.put(SNAPSHOT_LEVEL, self._header(timestamp_ms, TXID(1), writer.txid), image.pages(image.pgnos()))
            self._imaged = writer.txid

    def _write_changes(self, pgnos: Iterable[int], timestamp_ms: int, writer: _Writer) -> None:
        image = self._image
        assert image is not None
        skip = lock_pgno(image.page_size)
        wanted = sorted(pgno for pgno in pgnos if pgno <= image.commit and pgno != skip)
        writer.txid = TXID(writer.txid + 1)
        self._last = self._header(timestamp_ms, writer.txid, writer.txid), wanted
        writer.put(0, self._last[0], image.pages(wanted))

    def close_history(self, newest_ns: int, writer: _Writer) -> None:
        """Write the newest file once more, with a time that is not before that of the newest segment."""
        assert self._image is not None
        assert self._last is not None
        self._image.finish()
        header, pgnos = self._last
        timestamp_ms = -(-newest_ns // MILLISECOND)
        writer.put(
            1,
            self._header(timestamp_ms, header.min_txid, header.max_txid),
            self._image.pages(self._image.pgnos() if pgnos is None else pgnos),
        )

    def _header(self, timestamp_ms: int, low: TXID, high: TXID) -> Header:
        assert self._image is not None
        return Header(self._image.page_size, self._image.commit, low, high, timestamp_ms)


class _Image:
    """One database file in the making."""

    def __init__(self, url: str, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by close
        self._replay = Replay(self._file.fileno(), url, folder=folder, changed=self._note)
        self._changed: set[int] = set()

    def close(self) -> None:
        with self._replay:
            self._file.close()

    @property
    def page_size(self) -> int:
        return self._replay.page_size

    @property
    def commit(self) -> int:
        return self._replay.commit

    def _note(self, pgnos: NDArray[np.uint32]) -> None:
        self._changed.update(pgnos.tolist())

    def apply(self, pieces: Pieces) -> set[int]:
        """Apply the next file; return the pages that it wrote."""
        self._changed = set()
        info, data = next(pieces)
        if isinstance(info, SnapshotInfo):
            self._replay.snapshot(info, data)
        else:
            assert isinstance(info, SegmentInfo)
            self._replay.segment(info, data)
        return self._changed

    def finish(self) -> None:
        self._replay.finish()

    def pgnos(self) -> Iterator[int]:
        """Yield the numbers of all pages but the lock page."""
        skip = lock_pgno(self.page_size)
        return (pgno for pgno in range(1, self.commit + 1) if pgno != skip)

    def pages(self, pgnos: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        size, file = self.page_size, self._file.fileno()
        for pgno in pgnos:
            yield pgno, os.pread(file, size, (pgno - 1) * size).ljust(size, b"\0")

    def differing(self, new: _Image) -> list[int]:
        """Return the pages that are not the same in `new`, and those that only it has; all when page sizes differ."""
        size = new.page_size
        if size != self.page_size:
            return [*new.pgnos()]
        step = max(1, CHUNK_BYTES // size)
        found: list[int] = []
        for first in range(1, new.commit + 1, step):
            count = min(step, new.commit - first + 1)
            mine, theirs = self._range(first, count), new._range(first, count)
            common = max(0, min(count, self.commit - first + 1))
            if mine[: common * size] != theirs[: common * size]:
                found += [first + at for at in range(common) if mine[at * size : (at + 1) * size] != theirs[at * size : (at + 1) * size]]
            found += range(first + common, first + count)
        if not found and new.commit != self.commit:
            return [1]  # a file says the new size, and holds a page
        return found

    def _range(self, first: int, count: int) -> bytes:
        size = self.page_size
        return os.pread(self._file.fileno(), count * size, (first - 1) * size).ljust(count * size, b"\0")


def _holds(target: ReplicaClient, info: FileInfo, body: bytes | Path) -> bool:
    if isinstance(target, Comparing):
        return target.holds(info, body)
    with target.open(info) as stream:
        stored = hashlib.sha256()
        while data := stream.read(CHUNK_BYTES):
            stored.update(data)
    if isinstance(body, bytes):
        return stored.digest() == hashlib.sha256(body).digest()
    with body.open("rb") as file:
        return stored.digest() == hashlib.file_digest(file, "sha256").digest()
