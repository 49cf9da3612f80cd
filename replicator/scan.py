"""Read a whole database, page by page: all of it, or what differs from the page table. The lock page is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replicator.format.checksum import page_checksums
from replicator.format.sqlite import lock_pgno

if TYPE_CHECKING:
    from replicator.db import Database, Image
    from replicator.pagetable import PageTable

__all__ = ["all_pages", "differing_pages"]

Pages = Iterator[tuple[int, bytes | memoryview]]


def all_pages(database: Database, image: Image) -> Pages:
    """Yield (pgno, page) of a state, in ascending order."""
    for first, data in database.chunks(image):
        yield from _cut(first, data, image.page_size)


def differing_pages(database: Database, table: PageTable, image: Image) -> Pages:
    """Yield those pages of a state whose checksum is not the table's."""
    import numpy as np

    for first, data in database.chunks(image):
        pages = _cut(first, data, image.page_size)
        known = table.get(first, len(data) // image.page_size)
        if not known.any():  # the table knows none of them: no page has the checksum 0
            yield from pages
        elif pages:
            pgnos = np.array([pgno for pgno, _ in pages])
            found = np.array(page_checksums(pages), dtype=np.uint64)
            for index in (found != known[pgnos - first]).nonzero()[0].tolist():
                yield pages[index]


def _cut(first: int, data: bytes | bytearray, size: int) -> list[tuple[int, memoryview]]:
    skip, view = lock_pgno(size), memoryview(data)
    return [(first + index, view[index * size : (index + 1) * size]) for index in range(len(data) // size) if first + index != skip]
