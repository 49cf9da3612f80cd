"""WAL codec against WALs that SQLite wrote, and against the naive checksum loop."""

from __future__ import annotations

import os
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import FormatError
from replicator.format.wal import FRAME_HEADER_SIZE, WALHeader, decode_wal_header, frame_size, newest_frames, scan_frames


def naive(data: bytes, s0: int, s1: int, order: str) -> tuple[int, int]:
    for x0, x1 in struct.iter_unpack(f"{order}II", data):
        s0 = (s0 + x0 + s1) & 0xFFFFFFFF
        s1 = (s1 + x1 + s0) & 0xFFFFFFFF
    return s0, s1


def build(page_size: int, frames: list[tuple[int, int]], *, big_endian: bool) -> bytes:
    """Write a WAL with the naive checksum: the format as its specification tells it."""
    order = ">" if big_endian else "<"
    head = struct.pack(">6I", 0x377F0682 | big_endian, 3007000, page_size, 0, 7, 9)
    s0, s1 = naive(head, 0, 0, order)
    data = head + struct.pack(">II", s0, s1)
    for pgno, commit in frames:
        start, page = struct.pack(">II", pgno, commit), os.urandom(page_size)
        s0, s1 = naive(start + page, s0, s1, order)
        data += start + struct.pack(">4I", 7, 9, s0, s1) + page
    return data


def scan(data: bytes) -> tuple[WALHeader, object]:
    head = decode_wal_header(data)
    found = scan_frames(
        data[32:],
        page_size=head.page_size,
        salts=(head.salt1, head.salt2),
        checksum=(head.checksum1, head.checksum2),
        big_endian=head.big_endian,
    )
    return head, found


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 8192, 65536])
def test_all_frames_of_a_wal_that_sqlite_wrote_are_valid(tmp_path: Path, page_size: int) -> None:
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.execute(f"PRAGMA page_size={page_size}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(a)")
    for _ in range(20):
        connection.execute("INSERT INTO t VALUES(randomblob(2000))")
    data = (tmp_path / "a.db-wal").read_bytes()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.close()
    head, found = scan(data)
    assert head.page_size == page_size
    assert len(found) == found.committed() == (len(data) - 32) // frame_size(page_size)
    assert found.commits[-1] == pages


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 300])
def test_both_byte_orders_match_the_naive_loop(big_endian: bool, count: int) -> None:
    data = build(512, [(n % 7 + 1, 9 if n % 3 == 0 else 0) for n in range(count)], big_endian=big_endian)
    _, found = scan(data)
    assert len(found) == count
    last = data[-(512 + 8) : -512]
    assert tuple(found.checksums[-1].tolist()) == struct.unpack(">II", last)


@pytest.mark.parametrize("field", [0, 4, 8, 12, 16, 20, 24, 500])
def test_a_changed_frame_ends_the_wal(field: int) -> None:
    data = bytearray(build(512, [(1, 1)] * 5, big_endian=False))
    data[32 + 3 * 536 + field] ^= 1
    assert len(scan(bytes(data))[1]) == 3


def test_page_number_zero_and_a_short_frame_end_the_wal() -> None:
    data = build(512, [(1, 1), (0, 1), (2, 2)], big_endian=False)
    assert len(scan(data)[1]) == 1
    assert len(scan(build(512, [(1, 1), (2, 2)], big_endian=False)[:-1])[1]) == 1


def test_a_transaction_without_commit_frame_is_not_committed() -> None:
    _, found = scan(build(512, [(1, 0), (2, 2), (3, 0), (4, 0)], big_endian=False))
    assert (len(found), found.committed()) == (4, 2)


@given(st.binary(max_size=64))
def test_hostile_headers_are_errors(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_wal_header(data)


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 20))
def test_newest_frames_are_those_of_a_dict(pgnos: list[int], limit: int) -> None:
    model = {pgno: index for index, pgno in enumerate(pgnos) if pgno <= limit}
    distinct, index = newest_frames(np.array(pgnos, dtype=np.uint32), limit)
    assert dict(zip(distinct.tolist(), index.tolist(), strict=True)) == model
    assert distinct.tolist() == sorted(model)


def test_sizes() -> None:
    assert frame_size(4096) == 4096 + FRAME_HEADER_SIZE
