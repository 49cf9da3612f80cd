"""What the engine must know of the database file: page sizes, the header's magic, the lock page.

Source: SQLite file format, sections 1.3 and 2.
"""

from __future__ import annotations

from typing import NewType

__all__ = ["MAX_PAGE_SIZE", "MIN_PAGE_SIZE", "SQLITE_MAGIC", "Pgno", "is_page_size", "lock_pgno"]

Pgno = NewType("Pgno", int)
SQLITE_MAGIC = b"SQLite format 3\0"
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 512, 65536
LOCK_OFFSET = 0x40000000


def is_page_size(size: int) -> bool:
    """True for a power of two from 512 to 65536."""
    return MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE and size & (size - 1) == 0


def lock_pgno(page_size: int) -> Pgno:
    """Return the number of the page at 1 GiB, on which SQLite's lock bytes lie and which therefore holds nothing."""
    return Pgno(LOCK_OFFSET // page_size + 1)
