"""Read a whole database, page by page: all of it, or what differs from the page table. The lock page is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replicator.format.checksum import page_checksum
from replicator.format.sqlite import lock_pgno

if TYPE_CHECKING:
    from replicator.db import Database, Image
    from replicator.pagetable import PageTable

__all__ = ["all_pages", "differing_pages"]

Pages = Iterator[tuple[int, bytes | memoryview]]


def all_pages(database: Database, image: Image) -> Pages:
    """Yield (pgno, page) of a state, in ascending order."""
    size, skip = image.page_size, lock_pgno(image.page_size)
    for first, data in database.chunks(image):
        view = memoryview(data)
        for index in range(len(data) // size):
            if first + index != skip:
                yield first + index, view[index * size : (index + 1) * size]


def differing_pages(database: Database, table: PageTable, image: Image) -> Pages:
    """Yield those pages of a state whose checksum is not the table's."""
    size, skip = image.page_size, lock_pgno(image.page_size)
    for first, data in database.chunks(image):
        view = memoryview(data)
        known = table.get(first, len(data) // size).tolist()
        for index, checksum in enumerate(known):
            page = view[index * size : (index + 1) * size]
            if first + index != skip and checksum != page_checksum(first + index, page):
                yield first + index, page
