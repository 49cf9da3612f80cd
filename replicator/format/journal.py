"""SQLite's rollback journal: what a page was before it is overwritten, in the form that SQLite itself undoes.

    header, padded to a sector | record * n

Header, big-endian:

| offset | size | field |
|---|---|---|
| 0 | 8 | magic `d9d505f920a163d7` |
| 8 | 4 | number of records |
| 12 | 4 | nonce: where the checksums of the records start |
| 16 | 4 | size of the database in pages before the change |
| 20 | 4 | sector size |
| 24 | 4 | page size before the change |

Record: page number (4), the page as it was, checksum (4). The checksum is the nonce plus every 200th byte of the page, counted back from
the byte 200 before its end. The lock page has no record: its number ends a rollback.

A journal is *hot*, and the next reader rolls it back, when its first byte is not zero and nobody holds the RESERVED lock. So the records
are written and synced below a header of zeros first; the header makes them count, and zeros in its place end the transaction.

Source: SQLite file format, section 3; `pager.c`, `pager_cksum` and `hasHotJournal`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["JOURNAL_HEADER_SIZE", "JOURNAL_SECTOR_SIZE", "JournalHeader", "encode_record"]

JOURNAL_HEADER_SIZE = 28
JOURNAL_SECTOR_SIZE = 512
_MAGIC = bytes.fromhex("d9d505f920a163d7")
_HEADER = struct.Struct(">8sIIIII")


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What to undo: `page_count` and `page_size` are those before the change."""

    records: int
    nonce: int
    page_count: int
    page_size: int

    def encode(self) -> bytes:
        """Return the 28 bytes; the records begin at `JOURNAL_SECTOR_SIZE`."""
        return _HEADER.pack(_MAGIC, self.records, self.nonce, self.page_count, JOURNAL_SECTOR_SIZE, self.page_size)


def encode_record(pgno: int, page: bytes, nonce: int) -> bytes:
    """Return the record of one page."""
    checksum = (nonce + sum(page[len(page) - 200 : 0 : -200])) & 0xFFFFFFFF
    return b"".join((pgno.to_bytes(4, "big"), page, checksum.to_bytes(4, "big")))
