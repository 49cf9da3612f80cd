"""What the engine must know of the database file: page sizes, the header, the lock page.

Header, the first 100 bytes of page 1, big-endian:

| offset | size | field |
|---|---|---|
| 0 | 16 | magic `SQLite format 3\\0` |
| 16 | 2 | page size; 1 stands for 65536 |
| 18 | 1 + 1 | write version, read version: 1 rollback journal, 2 WAL |
| 20 | 1 | bytes reserved at the end of each page |
| 21 | 3 | payload fractions 64, 32, 32 |
| 24 | 4 | change counter |
| 28 | 4 | size of the database in pages |
| 32 | 4 + 4 | first freelist page, number of freelist pages |
| 40 | 4 + 4 | schema cookie, schema format |
| 48 | 4 + 4 | default cache size, largest root page (not 0: auto-vacuum) |
| 56 | 4 | text encoding |
| 60 | 4 | user version |
| 64 | 4 | not 0: incremental vacuum |
| 68 | 4 | application id |
| 72 | 20 | reserved |
| 92 | 4 | change counter for which the size at 28 is valid |
| 96 | 4 | version of the library that wrote last |

In WAL mode the change counter stands still; SQLite itself takes the size from the last commit frame.

Source: SQLite file format, sections 1.3 and 2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NewType

from replicator.errors import FormatError, Truncated

__all__ = [
    "DATABASE_HEADER_SIZE",
    "MAX_PAGE_SIZE",
    "MIN_PAGE_SIZE",
    "SQLITE_MAGIC",
    "DatabaseHeader",
    "Pgno",
    "decode_database_header",
    "is_page_size",
    "lock_pgno",
]

Pgno = NewType("Pgno", int)
SQLITE_MAGIC = b"SQLite format 3\0"
DATABASE_HEADER_SIZE = 100
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 512, 65536
LOCK_OFFSET = 0x40000000
_HEADER = struct.Struct(">16sHBBB3sIIIIIIiIIIII20sII")


def is_page_size(size: int) -> bool:
    """True for a power of two from 512 to 65536."""
    return MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE and size & (size - 1) == 0


def lock_pgno(page_size: int) -> Pgno:
    """Return the number of the page at 1 GiB, on which SQLite's lock bytes lie and which therefore holds nothing."""
    return Pgno(LOCK_OFFSET // page_size + 1)


@dataclass(frozen=True, slots=True)
class DatabaseHeader:
    """The fields that say how to read the file. `page_count` is meaningful while `size_is_valid`."""

    page_size: int
    write_version: int
    read_version: int
    reserved_bytes: int
    change_counter: int
    page_count: int
    version_valid_for: int
    sqlite_version: int

    @property
    def is_wal(self) -> bool:
        """True when the file asks for WAL mode."""
        return self.write_version == 2 and self.read_version == 2

    @property
    def size_is_valid(self) -> bool:
        """True when `page_count` was written by the last writer; old libraries left it alone."""
        return self.page_count != 0 and self.change_counter == self.version_valid_for


def decode_database_header(data: bytes | bytearray | memoryview) -> DatabaseHeader:
    """Decode the first 100 bytes of page 1.

    Raises:
        Truncated: fewer than 100 bytes.
        FormatError: wrong magic or page size; an encrypted database looks like that.

    Source: SQLite file format, section 1.3.
    """
    if len(data) < DATABASE_HEADER_SIZE:
        raise Truncated(f"database header has {len(data)} of {DATABASE_HEADER_SIZE} bytes")
    magic, size, write, read, reserved, _, counter, pages, *_, valid_for, version = _HEADER.unpack_from(data)
    if magic != SQLITE_MAGIC:
        raise FormatError("not an SQLite database: wrong magic")
    size = MAX_PAGE_SIZE if size == 1 else size
    if not is_page_size(size):
        raise FormatError(f"database header has page size {size}")
    return DatabaseHeader(size, write, read, reserved, counter, pages, valid_for, version)
