"""Merge stored files into one, with memory that does not grow with them.

Small files that follow each other are gathered: read one after the other, and of each page the newest block is kept, compressed. Most merges
are a thousand small files, and end there. Large ones, and what was gathered, are then read side by side in small pieces; more than `FAN_IN`
of them in groups first, through the scratch folder. An input is used only after its last byte was read and its checksum is right; until then
the result has no name.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import lz4.block

from replicator.errors import CorruptReplica, FormatError
from replicator.format.ltx import DecodedPage, Decoder, Encoder, FileInfo, Header
from replicator.format.merge import merge_headers, merge_pages
from replicator.outbox import OutFile, Spool, Staging

__all__ = ["FAN_IN", "Compacted", "compact"]

FAN_IN = 16
SLICE_BYTES = 32 << 10
"""A piece of a file decompresses to at most 255 times its size; this keeps `FAN_IN` of them small."""
SMALL_FILE_BYTES = 1 << 20
GATHER_BYTES, ENTRY_BYTES = 24 << 20, 200
"""What gathered pages may take in memory, and what each of them takes beside its block."""
RUN_BYTES, RUNS_BYTES, RESULT_BYTES = 256 << 10, 16 << 20, 2 << 20
"""What an intermediate result, all of them, and the final one may take in memory."""
BATCH_BYTES = 1 << 18

Read = Callable[[FileInfo], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Compacted:
    """The merged file, and how many of the inputs it holds: merging stops where the page size changes."""

    out: OutFile
    taken: int


def compact(inputs: Sequence[FileInfo], level: int, read: Read, scratch: Staging, *, gather_bytes: int = GATHER_BYTES) -> Compacted:
    """Merge files that follow each other.

    Args:
        inputs: in order of TXID.
        level: of the result.
        read: yields a file's bytes.
        scratch: takes what is too large for memory; the result may be a file there, which the caller removes.
        gather_bytes: how much is gathered at once; 0 to read everything side by side.

    Raises:
        CorruptReplica: an input fails a check; it is named.
        ObjectNotFound, StorageError, OSError: see there. Nothing is left in the scratch folder.
    """
    sources = [_Source.stored(info, read) for info in inputs]
    made: list[OutFile] = []

    def merge(group: list[_Source], *, is_last: bool) -> _Merged:
        in_memory = sum(len(run.body) for run in made if isinstance(run.body, bytes))
        limit = RESULT_BYTES if is_last else (RUN_BYTES if in_memory < RUNS_BYTES else 0)
        if gather_bytes and all(source.is_small for source in group):
            done = _gather(group, level, scratch, limit, gather_bytes)
        else:
            done = _merge(group, level, scratch, limit)
        made.append(done.out)
        return done

    try:
        while True:
            groups = list(_groups(sources, gather=gather_bytes > 0))
            following: list[_Source] = []
            for group in groups:
                if len(group) == 1 and len(groups) > 1:
                    following += group  # large: its turn comes when what is beside it is merged
                    continue
                done = merge(group, is_last=len(groups) == 1)
                following.append(_Source.made(done.out, group[: done.used]))
                while done.used < len(group) and not done.ends:
                    group = group[done.used :]
                    done = merge(group, is_last=False)
                    following.append(_Source.made(done.out, group[: done.used]))
                if done.ends:
                    break
            if len(following) == 1:
                made.remove(done.out)
                return Compacted(done.out, following[0].inputs)
            sources = following
    finally:
        for run in made:
            run.discard()


def _groups(sources: Sequence[_Source], *, gather: bool) -> Iterator[list[_Source]]:
    """Yield what is merged next: small files that follow each other as long as there are any, else up to `FAN_IN` of any size."""
    groups: list[list[_Source]] = []
    for source in sources if gather else ():
        if groups and source.is_small and groups[-1][-1].is_small:
            groups[-1].append(source)
        else:
            groups.append([source])
    if gather and len(groups) < len(sources):
        yield from groups
    else:
        yield from (list(sources[start : start + FAN_IN]) for start in range(0, len(sources), FAN_IN))


@dataclass(frozen=True, slots=True)
class _Merged:
    """A result, how many of the sources it holds, and whether nothing may follow it: there the page size changes."""

    out: OutFile
    used: int
    ends: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """One thing to merge: a stored file, or what was made of several (`inputs`). `is_small`: one that may be gathered."""

    name: str
    min_txid: int
    max_txid: int
    pieces: Callable[[], Iterator[bytes]]
    is_small: bool = False
    inputs: int = 1

    @classmethod
    def stored(cls, info: FileInfo, read: Read) -> _Source:
        return cls(f"level {info.level} {info.name}", info.min_txid, info.max_txid, _reading(read, info), info.size <= SMALL_FILE_BYTES)

    @classmethod
    def made(cls, run: OutFile, of: Sequence[_Source]) -> _Source:
        pieces = partial(run.pieces, SLICE_BYTES)
        return cls("a merged file", run.min_txid, run.max_txid, pieces, inputs=sum(source.inputs for source in of))


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

    def batches(self) -> Iterator[list[DecodedPage]]:
        """Yield all pages; returns when the last byte is read and everything is found right."""
        yield self._first
        self._first = []
        while piece := self._next():
            yield self._feed(piece)
        self._feed(b"")


def _gather(sources: Sequence[_Source], level: int, scratch: Staging, limit_bytes: int, gather_bytes: int) -> _Merged:
    """Merge small files, as many as fit into `gather_bytes` and at least one."""
    headers: list[Header] = []
    newest: dict[int, bytes] = {}
    size, ends = 0, False
    for source in sources:
        reader = _Reader(source)
        if headers and reader.header.page_size != headers[0].page_size:
            ends = True
            break
        headers.append(reader.header)
        for batch in reader.batches():
            for pgno, _, block in batch:
                size += len(block) - len(newest.get(pgno, b""))
                newest[pgno] = block
        if size + len(newest) * ENTRY_BYTES > gather_bytes:
            break
    header = _merged_header(headers, sources)
    decompress, page_size = lz4.block.decompress, header.page_size
    pages = (
        (pgno, decompress(newest[pgno], uncompressed_size=page_size), newest[pgno]) for pgno in sorted(newest) if pgno <= header.commit
    )
    return _Merged(_encode(level, header, pages, scratch, limit_bytes), len(headers), ends)


def _merge(sources: Sequence[_Source], level: int, scratch: Staging, limit_bytes: int) -> _Merged:
    """Merge up to `FAN_IN` inputs of any size."""
    readers: list[_Reader] = []
    for source in sources:
        reader = _Reader(source)
        if readers and reader.header.page_size != readers[0].header.page_size:
            break
        readers.append(reader)
    header = _merged_header([reader.header for reader in readers], sources)
    pages = merge_pages([itertools.chain.from_iterable(reader.batches()) for reader in readers], header.commit)
    return _Merged(_encode(level, header, pages, scratch, limit_bytes), len(readers), len(readers) < len(sources))


def _merged_header(headers: Sequence[Header], sources: Sequence[_Source]) -> Header:
    try:
        return merge_headers(headers)
    except FormatError as error:
        raise CorruptReplica(f"{sources[0].name} to {sources[len(headers) - 1].name}", str(error)) from error


def _encode(level: int, header: Header, pages: Iterator[DecodedPage], scratch: Staging, limit_bytes: int) -> OutFile:
    spool = Spool(scratch, f"{secrets.token_hex(8)}.ltx", limit_bytes=limit_bytes)
    try:
        encoder = Encoder(spool.write, header)
        while batch := list(itertools.islice(pages, max(1, BATCH_BYTES // header.page_size))):
            encoder.blocks(batch)
        encoder.close()
        body = spool.finish()
    except FormatError as error:  # the inputs are sound, each by itself
        spool.discard()
        raise CorruptReplica(f"the files that lead to TXID {header.max_txid:016x}", str(error)) from error
    except BaseException:
        spool.discard()
        raise
    return OutFile(level, header.min_txid, header.max_txid, header.timestamp_ms, body)


def _reading(read: Read, info: FileInfo) -> Callable[[], Iterator[bytes]]:
    return lambda: _sliced(read(info))


def _sliced(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), SLICE_BYTES):
            yield piece[at : at + SLICE_BYTES]
