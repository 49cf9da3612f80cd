"""Read a chain of stored files so that each page is handed out once, from the newest file that holds it.

1. Header and page index of each file are fetched by ranged reads (small files as a whole) and say which file owns which page. A full image
   needs no index for that: it has every page.
2. Then every file is read to its end, several at once where they come through a network, and everything the decoder can check is checked: files are NoChecksum and
   their blocks carry no checksum, so a flipped literal shows only in the file's checksum. Pages owned by a later file are hashed, not written.
3. An index is not trusted before that: at the end each page must have been handed out, and only by its owner.

Memory: one small number for each page, and what is in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from replicator.errors import CorruptReplica, FormatError, StorageUnavailable
from replicator.format.ltx import LTX_HEADER_SIZE, SNAPSHOT_LEVEL, Decoder, FileInfo, Header, decode_header, index_range
from replicator.format.pageindex import decode_index
from replicator.format.sqlite import lock_pgno
from replicator.storage.base import ReplicaClient

__all__ = ["Progress", "list_files", "read_chain", "read_file"]

SMALL_FILE_BYTES = 256 << 10
KEPT_BYTES = 32 << 20
PAGE_LEAST_BYTES = 10
READ_BYTES = 1 << 18  # larger pieces cost more: their memory is fresh each time
RUN_BYTES, RUN_PAGES = 1 << 20, 1024
RETRY_DELAYS_S = (0.25, 0.5, 1.0)
PROGRESS_EVERY_S = 0.05

log = logging.getLogger(__name__)

Write = Callable[[int, Sequence[bytes]], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a restore is; bytes are those of the stored files."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int


def list_files(client: ReplicaClient, *, accurate_times: bool = False) -> dict[int, list[FileInfo]]:
    """Return what is stored on all levels, each in ascending order."""
    levels = range(SNAPSHOT_LEVEL + 1)

    def one(level: int) -> list[FileInfo]:
        return list(client.list(level, accurate_times=accurate_times))

    if client.kind in ("file", "memory"):
        return {level: one(level) for level in levels}
    # Raw files first: what is merged and deleted afterwards is then found in the level above.
    raw = one(0)
    with ThreadPoolExecutor(len(levels) - 1) as pool:
        return {0: raw, **dict(zip(levels[1:], pool.map(one, levels[1:]), strict=True))}


class _Short(StorageUnavailable):
    """A stream that ended early without an error: the object is shorter than it was listed, if it happens again and again."""


def read_file(client: ReplicaClient, info: FileInfo, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[bytes]:
    """Yield a file's bytes, resuming at the offset after a dropped connection: three times for each file.

    Raises:
        ObjectNotFound, StorageError: at once.
        StorageUnavailable: after the last try.
        CorruptReplica: the file is shorter than it was listed.
    """
    at, tries = 0, 0
    while at < info.size:
        try:
            with client.open(info, offset=at) as stream:
                while data := stream.read(READ_BYTES):
                    at += len(data)
                    yield data
                if at < info.size:
                    raise _Short(f"the stream ended at {at} of {info.size} bytes")
        except StorageUnavailable as error:
            if tries == len(RETRY_DELAYS_S):
                if isinstance(error, _Short):
                    raise CorruptReplica(f"{client.url} level {info.level} {info.name}", str(error)) from error
                raise
            sleep(RETRY_DELAYS_S[tries])
            tries += 1


def read_chain(
    client: ReplicaClient,
    files: Sequence[FileInfo],
    write: Write,
    *,
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
) -> Header:
    """Hand out each page of the state that `files` lead to, and return the newest file's header.

    Args:
        files: a plan: the first begins at TXID 1.
        write: called as `write(first_pgno, pages)` with runs of up to 1,024 consecutive pages, each page up to the final size exactly once
            (the lock page never), from several threads.
        parallelism: files that are read at once, where they come through a network.

    Raises:
        CorruptReplica: a file fails a check; it is named.
        ObjectNotFound: a file is gone: list and plan again.
        StorageError: see there.
    """
    with ThreadPoolExecutor(max(1, parallelism)) as pool:
        job = _Job(client, files, write, progress)
        for index, (header, kept) in enumerate(pool.map(job.look, range(len(files)))):
            job.add(index, header, kept)
        job.check_owners()
        # Only a network is waited for. Several threads that decode at once hand the interpreter lock around, several times a page.
        in_memory = sorted(job.kept)  # they come first, so that they are there no longer than needed
        others = [index for index in range(len(files)) if index not in job.kept]
        turns = [[*in_memory, *others]] if client.kind == "file" else [in_memory, *([index] for index in others)]
        tasks = [pool.submit(job.read_in_turn, indexes) for indexes in turns]
        done, waiting = wait(tasks, return_when=FIRST_EXCEPTION)
        if waiting:
            job.stop.set()
            for task in waiting:
                task.cancel()
            wait(waiting)
        for task in done:
            task.result()
    job.check_written()
    return job.headers[-1]


class _Job:
    def __init__(self, client: ReplicaClient, files: Sequence[FileInfo], write: Write, progress: Callable[[Progress], None] | None) -> None:
        self.client, self.files, self.write, self.progress = client, files, write, progress
        self.stop = threading.Event()
        self.headers: list[Header] = []
        self.kept: dict[int, bytes] = {}
        self.indexes: dict[int, array[int]] = {}
        self.owners = array("I")
        self.written = [0] * len(files)
        self._guard = threading.Lock()
        self._done_files = self._done_bytes = self._kept_bytes = 0
        self._total = sum(info.size for info in files)
        self._told = 0.0

    def name(self, index: int) -> str:
        info = self.files[index]
        return f"{self.client.url} level {info.level} {info.name}"

    def look(self, index: int) -> tuple[Header, bytes]:
        """Fetch header and page index of a file; returns its bytes, when it is small."""
        info = self.files[index]
        if info.size < LTX_HEADER_SIZE:
            raise CorruptReplica(self.name(index), f"invalid ltx file: {info.size} bytes, minimum {LTX_HEADER_SIZE}")
        small = info.size <= SMALL_FILE_BYTES
        if small:
            data = b"".join(read_file(self.client, info))
            start, tail = data[:LTX_HEADER_SIZE], data[-24:]
        else:
            data = b""
            start, tail = self._range(info, 0, LTX_HEADER_SIZE), self._range(info, info.size - 24, 24)
        try:
            header = decode_header(start)
            header.validate()
            if header.is_snapshot and header.commit > info.size // PAGE_LEAST_BYTES:
                raise FormatError(f"a full image of {header.commit} pages does not fit into {info.size} bytes")
            if (header.min_txid, header.max_txid) != (info.min_txid, info.max_txid):
                raise FormatError("the header's TXIDs are not those of the name")
            offset, size = index_range(info.size, tail)
            pgnos = array("I")
            if not header.is_snapshot:
                for part in decode_index([data[offset : offset + size]] if small else self._pieces(info, offset, size)):
                    if part.pgnos[-1] > header.commit:
                        raise FormatError(f"page index lists page {part.pgnos[-1]} of {header.commit}")
                    pgnos.extend(array("I", part.pgnos))
        except FormatError as error:
            raise CorruptReplica(self.name(index), str(error)) from error
        with self._guard:
            self.indexes[index] = pgnos
            keep = small and self._kept_bytes + len(data) <= KEPT_BYTES
            self._kept_bytes += len(data) if keep else 0
        return header, data if keep else b""

    def _range(self, info: FileInfo, offset: int, size: int) -> bytes:
        return b"".join(self._pieces(info, offset, size))

    def _pieces(self, info: FileInfo, offset: int, size: int) -> Iterator[bytes]:
        with self.client.open(info, offset=offset, size=size) as stream:
            while size > 0 and (data := stream.read(min(size, READ_BYTES))):
                yield data
                size -= len(data)

    def add(self, index: int, header: Header, kept: bytes) -> None:
        if self.headers and header.page_size != self.headers[0].page_size:
            raise CorruptReplica(self.name(index), f"mismatched page sizes: {self.headers[0].page_size} and {header.page_size}")
        self.headers.append(header)
        if kept:
            self.kept[index] = kept

    def check_owners(self) -> None:
        """Decide which file each page comes from: `owners` holds its number, from 1 on; 0 for what is no page to be read."""
        if not self.headers[0].is_snapshot:
            raise CorruptReplica(self.name(0), "the chain does not begin with a full image")
        commit, lock = self.headers[-1].commit, lock_pgno(self.headers[-1].page_size)
        image = max(index for index, header in enumerate(self.headers) if header.is_snapshot)
        later = range(image + 1, len(self.files))
        # The sizes come from files that nobody has checked yet: more pages than there are in them are not made room for.
        most = self.headers[image].commit + sum(len(self.indexes[index]) for index in later) + 1
        limit, of_image = min(commit, most), min(commit, self.headers[image].commit)
        code = "H" if len(self.files) < 1 << 16 else "I"
        owners = array(code, [0]) + array(code, [image + 1]) * of_image + array(code, [0]) * (limit - of_image)
        for index in later:
            for pgno in self.indexes[index]:
                if pgno <= limit:
                    owners[pgno] = index + 1
        if lock <= limit:
            owners[lock] = 1
        owners[0] = 1
        if 0 in owners:
            raise self._missing(owners.index(0))
        if commit > limit:
            raise self._missing(limit + 1)
        owners[0] = 0
        if lock <= commit:
            owners[lock] = 0
        self.owners = owners
        self.indexes = {}

    def _missing(self, pgno: int) -> CorruptReplica:
        """Blame the file with which the database grew over a page that no index lists: every such page must be in it."""
        sizes = [0, *(header.commit for header in self.headers)]
        index = max(at for at in range(len(self.files)) if sizes[at] < pgno <= sizes[at + 1])
        return CorruptReplica(self.name(index), f"page {pgno} of the database is in no file")

    def read_in_turn(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            self.read(index)

    def read(self, index: int) -> None:
        """Read one file to its end and hand out what it owns."""
        decoder = Decoder()
        owners, mine, limit = self.owners, index + 1, len(self.owners) - 1
        run: list[bytes] = []
        first = following = 0
        most = min(max(1, RUN_BYTES // self.headers[0].page_size), RUN_PAGES)
        info = self.files[index]
        kept = self.kept.pop(index, None)
        try:
            for data in [kept] if kept is not None else read_file(self.client, info):
                if self.stop.is_set():
                    return
                for pgno, page, _ in decoder.feed(data):
                    if pgno <= limit and owners[pgno] == mine:
                        if pgno != following or len(run) >= most:
                            self._hand_out(index, first, run)
                            run, first = [], pgno
                        run.append(page)
                        following = pgno + 1
                self._tell(0, len(data))
            decoder.close()
            self._hand_out(index, first, run)
        except FormatError as error:
            raise CorruptReplica(self.name(index), str(error)) from error
        self._tell(1, 0)

    def _hand_out(self, index: int, first: int, run: list[bytes]) -> None:
        if run:
            self.write(first, run)
            self.written[index] += len(run)

    def check_written(self) -> None:
        if sum(self.written) == len(self.owners) - self.owners.count(0):
            return  # none has handed out more than it owns
        owned = Counter(self.owners)
        for index, written in enumerate(self.written):
            if owned[index + 1] != written:
                raise CorruptReplica(
                    self.name(index), f"its page index promises {owned[index + 1]} pages that are needed, it has {written}"
                )

    def _tell(self, files: int, size: int) -> None:
        if self.progress is None:
            return
        with self._guard:
            self._done_files += files
            self._done_bytes += size
            now = time.monotonic()
            if now - self._told >= PROGRESS_EVERY_S or self._done_files == len(self.files):
                self._told = now
                self.progress(Progress(self._done_files, len(self.files), self._done_bytes, self._total))
