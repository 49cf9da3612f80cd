"""Merge stored files into one, with memory that does not grow with them.

Small files that follow each other are gathered: read one after the other, and of each page the newest block is kept, compressed. Most merges
are a thousand small files, and end there. Large ones are read side by side in small pieces, with what was gathered among them; more than
`FAN_IN` of them in groups first, through the scratch folder. An input is used only after its last byte was read and its checksum is right; until then
the result has no name.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    kept_bytes = 0
    gathering = min(gather_bytes, 2 * sum(info.size for info in inputs))  # at most, with what Python adds
    if scratch.memory is not None and not scratch.memory.take(gathering):
        gather_bytes = gathering = 0  # slower, in slices

    def merge(group: Sequence[_Source], *, is_last: bool) -> _Merged:
        nonlocal kept_bytes
        if gather_bytes and all(source.is_small for source in group):
            gathered = _gather(group, gather_bytes)
            header, pages, used, ends = gathered.header, gathered.pages(), gathered.used, gathered.ends
            if not (is_last and used == len(group)) and kept_bytes + gathered.size <= gather_bytes:
                kept_bytes += gathered.size
                return _Merged(_Source.gathered(gathered, group[:used]), used, ends)
        else:
            header, pages, used = _side_by_side(group)
            ends = used < len(group)
        in_memory = sum(len(run.body) for run in made if isinstance(run.body, bytes))
        limit = RESULT_BYTES if is_last else (RUN_BYTES if in_memory < RUNS_BYTES else 0)
        run = _encode(level, header, pages, scratch, limit)
        made.append(run)
        return _Merged(_Source.made(run, group[:used]), used, ends)

    try:
        while True:
            groups = list(_groups(sources, gather=gather_bytes > 0))
            following: list[_Source] = []
            for group in groups:
                if len(group) == 1 and len(groups) > 1:
                    following += group  # large: its turn comes when what is beside it is merged
                    continue
                ends = False
                while group and not ends:
                    done = merge(group, is_last=len(groups) == 1 and not following)
                    following.append(done.source)
                    group, ends = group[done.used :], done.ends
                if ends:
                    break
            result = following[0].run
            if len(following) == 1 and result is not None:
                made.remove(result)
                return Compacted(result, following[0].inputs)
            sources = following
    finally:
        if scratch.memory is not None:
            scratch.memory.give(gathering)
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
    """What became of a group, how many of its sources are in it, and whether nothing may follow it: there the page size changes."""

    source: _Source
    used: int
    ends: bool


class _Input(Protocol):
    """A source that is being read."""

    @property
    def name(self) -> str: ...

    @property
    def header(self) -> Header: ...

    def batches(self) -> Iterator[Iterable[DecodedPage]]:
        """Yield all pages; returns when everything is found right."""


@dataclass(frozen=True, slots=True)
class _Source:
    """One thing to merge: a stored file, or what was made of several (`inputs`): a file again (`run`), or pages in memory.

    `is_small`: a file that may be gathered.
    """

    name: str
    open: Callable[[], _Input]
    is_small: bool = False
    inputs: int = 1
    run: OutFile | None = None

    @classmethod
    def stored(cls, info: FileInfo, read: Read) -> _Source:
        name = f"level {info.level} {info.name}"
        return cls(name, lambda: _Reader(name, info.min_txid, info.max_txid, _sliced(read(info))), info.size <= SMALL_FILE_BYTES)

    @classmethod
    def made(cls, run: OutFile, of: Sequence[_Source]) -> _Source:
        name = "a merged file"
        inputs = sum(source.inputs for source in of)
        return cls(name, lambda: _Reader(name, run.min_txid, run.max_txid, run.pieces(SLICE_BYTES)), inputs=inputs, run=run)

    @classmethod
    def gathered(cls, gathered: _Gathered, of: Sequence[_Source]) -> _Source:
        return cls(gathered.name, lambda: gathered, inputs=sum(source.inputs for source in of))


class _Reader:
    """One input while it is read; `header` is there from the beginning."""

    def __init__(self, name: str, min_txid: int, max_txid: int, pieces: Iterator[bytes]) -> None:
        self.name = name
        self._pieces = pieces
        self._decoder = Decoder(keep_blocks=True)
        self._first: list[DecodedPage] = []
        while self._decoder.header is None:
            self._first = self._feed(self._next())
        self.header: Header = self._decoder.header
        if (self.header.min_txid, self.header.max_txid) != (min_txid, max_txid):
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


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The newest block of each page of `used` small files. `size` is what that takes in memory, about; `ends` as in `_Merged`."""

    name: str
    header: Header
    blocks: dict[int, bytes]
    size: int
    used: int
    ends: bool

    def pages(self) -> Iterator[DecodedPage]:
        decompress, page_size, commit, blocks = lz4.block.decompress, self.header.page_size, self.header.commit, self.blocks
        return ((pgno, decompress(blocks[pgno], uncompressed_size=page_size), blocks[pgno]) for pgno in sorted(blocks) if pgno <= commit)

    def batches(self) -> Iterator[Iterable[DecodedPage]]:
        yield self.pages()


def _gather(sources: Sequence[_Source], gather_bytes: int) -> _Gathered:
    """Read small files, as many as fit into `gather_bytes` and at least one."""
    headers: list[Header] = []
    newest: dict[int, bytes] = {}
    size, ends = 0, False
    for source in sources:
        reader = source.open()
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
    name = f"{sources[0].name} to {sources[len(headers) - 1].name}"
    return _Gathered(name, _merged_header(headers, name), newest, size + len(newest) * ENTRY_BYTES, len(headers), ends)


def _side_by_side(sources: Sequence[_Source]) -> tuple[Header, Iterator[DecodedPage], int]:
    """Merge up to `FAN_IN` inputs of any size; returns header and pages of the result, and how many it holds."""
    inputs: list[_Input] = []
    for source in sources:
        following = source.open()
        if inputs and following.header.page_size != inputs[0].header.page_size:
            break
        inputs.append(following)
    header = _merged_header([one.header for one in inputs], f"{inputs[0].name} to {inputs[-1].name}")
    return header, merge_pages([itertools.chain.from_iterable(one.batches()) for one in inputs], header.commit), len(inputs)


def _merged_header(headers: Sequence[Header], name: str) -> Header:
    try:
        return merge_headers(headers)
    except FormatError as error:
        raise CorruptReplica(name, str(error)) from error


def _encode(level: int, header: Header, pages: Iterator[DecodedPage], scratch: Staging, limit_bytes: int) -> OutFile:
    spool = Spool(scratch, f"{secrets.token_hex(8)}.ltx", limit_bytes=limit_bytes)
    try:
        encoder = Encoder(spool.write, header)
        while batch := list(itertools.islice(pages, max(1, BATCH_BYTES // header.page_size))):
            encoder.blocks(batch)
        encoder.close()
        return spool.finish(OutFile(level, header.min_txid, header.max_txid, header.timestamp_ms, b""))
    except FormatError as error:  # the inputs are sound, each by itself
        spool.discard()
        raise CorruptReplica(f"the files that lead to TXID {header.max_txid:016x}", str(error)) from error
    except BaseException:
        spool.discard()
        raise


def _sliced(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), SLICE_BYTES):
            yield piece[at : at + SLICE_BYTES]
