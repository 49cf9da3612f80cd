"""Merge stored files into one, with memory that does not grow with them.

All inputs are read side by side in small pieces. More than `FAN_IN` of them are merged in groups first, through the scratch folder. An input is
used only after its last byte was read and its checksum is right; until then the result has no name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from replicator.errors import CorruptReplica, FormatError
from replicator.format.ltx import DecodedPage, Decoder, Encoder, FileInfo, Header
from replicator.format.merge import merge_headers, merge_pages
from replicator.outbox import OutFile, Spool, Staging

__all__ = ["FAN_IN", "Compacted", "compact"]

FAN_IN = 16
SLICE_BYTES = 32 << 10
"""A piece of a file decompresses to at most 255 times its size; this keeps `FAN_IN` of them small."""
RUN_BYTES, RUNS_BYTES, RESULT_BYTES = 256 << 10, 16 << 20, 2 << 20
"""What an intermediate result, all of them, and the final one may take in memory."""

Read = Callable[[FileInfo], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Compacted:
    """The merged file, and how many of the inputs it holds: merging stops where the page size changes."""

    out: OutFile
    taken: int


def compact(inputs: Sequence[FileInfo], level: int, read: Read, scratch: Staging) -> Compacted:
    """Merge files that follow each other.

    Args:
        inputs: in order of TXID.
        level: of the result.
        read: yields a file's bytes.
        scratch: takes what is too large for memory; the result may be a file there, which the caller removes.

    Raises:
        CorruptReplica: an input fails a check; it is named.
        ObjectNotFound, StorageError, OSError: see there. Nothing is left in the scratch folder.
    """
    sources = [_Source(f"level {info.level} {info.name}", info.min_txid, info.max_txid, _reading(read, info)) for info in inputs]
    made: list[OutFile] = []
    taken = 0
    try:
        while True:
            last = len(sources) <= FAN_IN
            runs: list[OutFile] = []
            count = 0
            for start in range(0, len(sources), FAN_IN):
                group = sources[start : start + FAN_IN]
                in_memory = sum(len(run.body) for run in made if isinstance(run.body, bytes))
                limit = RESULT_BYTES if last else (RUN_BYTES if in_memory < RUNS_BYTES else 0)
                run, used = _merge(group, level, scratch, limit)
                made.append(run)
                if runs and _page_size(run) != _page_size(runs[0]):
                    break
                runs.append(run)
                count += used
                if used < len(group):
                    break
            taken = taken or count
            if len(runs) == 1:
                made.remove(runs[0])
                return Compacted(runs[0], taken)
            sources = [_Source("a merged file", run.min_txid, run.max_txid, partial(run.pieces, SLICE_BYTES)) for run in runs]
    finally:
        for run in made:
            run.discard()


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    min_txid: int
    max_txid: int
    pieces: Callable[[], Iterator[bytes]]


class _Reader:
    """One input while it is read; `header` is there from the beginning."""

    def __init__(self, source: _Source) -> None:
        self.name = source.name
        self._pieces = source.pieces()
        self._decoder = Decoder(keep_blocks=True)
        self._first: list[DecodedPage] = []
        while self._decoder.header is None:
            self._first = self._feed(self._next())
        self.header: Header = self._decoder.header
        if (self.header.min_txid, self.header.max_txid) != (source.min_txid, source.max_txid):
            raise CorruptReplica(self.name, "the header's TXIDs are not those of the name")

    def _feed(self, piece: bytes) -> list[DecodedPage]:
        try:
            if not piece:
                self._decoder.close()
                return []
            return self._decoder.feed(piece)
        except FormatError as error:
            raise CorruptReplica(self.name, str(error)) from error

    def _next(self) -> bytes:
        try:
            return next(self._pieces, b"")
        except CorruptReplica as error:  # under the name by which the caller knows it
            raise CorruptReplica(self.name, error.reason) from error

    def pages(self) -> Iterator[DecodedPage]:
        yield from self._first
        self._first = []
        while piece := self._next():
            yield from self._feed(piece)
        self._feed(b"")


def _merge(sources: Sequence[_Source], level: int, scratch: Staging, limit_bytes: int) -> tuple[OutFile, int]:
    """Merge up to `FAN_IN` inputs; returns the result and how many it holds."""
    readers: list[_Reader] = []
    for source in sources:
        reader = _Reader(source)
        if readers and reader.header.page_size != readers[0].header.page_size:
            break
        readers.append(reader)
    names = f"{readers[0].name} to {readers[-1].name}"
    spool = Spool(scratch, f"{secrets.token_hex(8)}.ltx", limit_bytes=limit_bytes)
    try:
        header = merge_headers([reader.header for reader in readers])
        encoder = Encoder(spool.write, header)
        for pgno, page, block in merge_pages([reader.pages() for reader in readers], header.commit):
            encoder.block(pgno, block, page)
        encoder.close()
        body = spool.finish()
    except FormatError as error:
        spool.discard()
        raise CorruptReplica(names, str(error)) from error
    except BaseException:
        spool.discard()
        raise
    return OutFile(level, header.min_txid, header.max_txid, header.timestamp_ms, body), len(readers)


def _reading(read: Read, info: FileInfo) -> Callable[[], Iterator[bytes]]:
    return lambda: _sliced(read(info))


def _sliced(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), SLICE_BYTES):
            yield piece[at : at + SLICE_BYTES]


def _page_size(run: OutFile) -> int:
    if isinstance(run.body, bytes):
        return int.from_bytes(run.body[8:12], "big")
    with run.body.open("rb") as file:
        return int.from_bytes(file.read(12)[8:12], "big")
