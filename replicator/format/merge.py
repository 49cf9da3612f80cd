"""Merge LTX files that follow each other into one: of each page the newest image wins, pages past the end of the database are dropped.

Pages travel in compressed form; decompressed they are only hashed. The result is the peer's, field by field: WAL fields and node id are
zero, the size of the database and the time are those of the last file.

Source: specification, section 1.8.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from replicator.errors import FormatError
from replicator.format.ltx import DecodedPage, Header, format_txid

__all__ = ["merge_headers", "merge_pages"]


def merge_headers(headers: Sequence[Header]) -> Header:
    """Return the header of the merged file.

    Raises:
        FormatError: the files do not follow each other, or have different page sizes.
    """
    first, last = headers[0], headers[-1]
    for one, two in pairwise(headers):
        if two.page_size != one.page_size:
            raise FormatError(f"mismatched page sizes: {one.page_size} and {two.page_size}")
        if two.min_txid > one.max_txid + 1 or two.max_txid <= one.max_txid:
            raise FormatError(f"files do not follow each other: {format_txid(one.max_txid)}, then {format_txid(two.min_txid)}")
    return Header(last.page_size, last.commit, first.min_txid, last.max_txid, last.timestamp_ms)


def merge_pages(inputs: Sequence[Iterable[DecodedPage]], commit: int) -> Iterator[DecodedPage]:
    """Yield each page up to `commit` once, in ascending order, from the last input that has it.

    Every input is read to its end, also where nothing of it is needed: only then its checksum has been verified.

    Args:
        inputs: pages of each file in ascending order, the oldest file first; with blocks (`Decoder(keep_blocks=True)`).
    """
    newest = 0
    for pgno, _, page, block in heapq.merge(*(_ranked(pages, -rank) for rank, pages in enumerate(inputs))):
        if newest < pgno <= commit:
            newest = pgno
            yield pgno, page, block


def _ranked(pages: Iterable[DecodedPage], rank: int) -> Iterator[tuple[int, int, bytes, bytes]]:
    for pgno, page, block in pages:
        yield pgno, rank, page, block
