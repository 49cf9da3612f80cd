"""Histories of the 0.3 format that are made up, and what must come out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from replicator.format.checksum import wal_checksum
from replicator.format.v3 import encode_frame, segment_name, segments_folder, snapshot_name, snapshots_folder
from replicator.format.wal import FrameHeader, WALHeader
from replicator.storage.memory import MemoryClient

GENERATION = "00112233445566ff"
PAGE = 512

Transaction = tuple[Mapping[int, int], int]
"""Page numbers with what fills them, and the size of the database after the commit in pages (0: not committed)."""


def page(pgno: int, fill: int) -> bytes:
    """A page; the first one has the header of a database."""
    data = bytes([fill % 256, fill // 256 % 256]) * (PAGE // 2)
    if pgno != 1:
        return data
    return b"SQLite format 3\0" + PAGE.to_bytes(2, "big") + b"\2\2" + data[20:]


def wal(transactions: Sequence[Transaction], *, salt: int, big_endian: bool = False) -> bytes:
    """The bytes of a WAL file."""
    header = WALHeader(big_endian, PAGE, 0, salt, salt * 7 % 2**32, 0, 0)
    sums = wal_checksum(header.encode()[:24], 0, 0, big_endian=big_endian)
    out = header.encode()[:24] + b"".join(item.to_bytes(4, "big") for item in sums)
    for pages, commit in transactions:
        for at, (pgno, fill) in enumerate(pages.items(), 1):
            start = FrameHeader(pgno, commit if at == len(pages) else 0, header.salt1, header.salt2, 0, 0).encode()
            image = page(pgno, fill)
            sums = wal_checksum(start[:8] + image, *sums, big_endian=big_endian)
            out += start[:16] + b"".join(item.to_bytes(4, "big") for item in sums) + image
    return out


def apply(database: bytes, transactions: Sequence[Transaction]) -> bytes:
    """What a checkpoint of that WAL makes of a database: the newest committed frame of each page, then the last commit's size."""
    committed = [number for number, (_, commit) in enumerate(transactions, 1) if commit]
    if not committed:
        return database
    size = transactions[committed[-1] - 1][1]
    newest: dict[int, int] = {}
    for pages, _ in transactions[: committed[-1]]:
        newest |= pages
    out = bytearray(database[: size * PAGE].ljust(size * PAGE, b"\0"))
    for pgno, fill in newest.items():
        if pgno <= size:
            out[(pgno - 1) * PAGE : pgno * PAGE] = page(pgno, fill)
    return bytes(out)


@dataclass
class Clock:
    """Time that goes on by a second with each object."""

    now_ns: int = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        self.now_ns += 10**9
        return self.now_ns


def store(objects: Mapping[str, bytes], clock: Clock | None = None) -> MemoryClient:
    """A replica that holds these objects, stored one after the other."""
    client = MemoryClient(clock_ns=clock or Clock())
    for name, data in objects.items():
        client.put_object(name, data)
    return client


def replica(database: bytes, wals: Sequence[bytes], cuts: Sequence[Sequence[int]], *, first: int = 0) -> dict[str, bytes]:
    """The objects of a generation: a snapshot, and each WAL cut at those offsets."""
    objects = {f"{snapshots_folder(GENERATION)}/{snapshot_name(first)}": encode_frame(database)}
    for index, (data, at) in enumerate(zip(wals, cuts, strict=True), first):
        edges = sorted({0, *(cut for cut in at if 0 < cut < len(data)), len(data)})
        for low, high in pairwise(edges):
            objects[segment(index, low)] = encode_frame(data[low:high])
    return objects


def segment(index: int, offset: int) -> str:
    return f"{segments_folder(GENERATION)}/{segment_name(index, offset)}"
