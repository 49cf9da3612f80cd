"""The WAL codec, with WALs that SQLite wrote as the oracle."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest

from replicator.errors import ChecksumMismatch, FormatError, Truncated
from replicator.format.checksum import wal_checksum
from replicator.format.wal import (
    FrameHeader,
    Frames,
    WALHeader,
    _scan_many,
    decode_frame_header,
    decode_wal_header,
    frame_count,
    frame_offset,
    frame_size,
    newest_frames,
    scan_frames,
)


def sqlite_wal(path: Path, page_size: int = 512, transactions: int = 12) -> bytes:
    """The WAL after some transactions of several pages each."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size={page_size}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("CREATE TABLE t(x)")
    for number in range(transactions):
        connection.execute("INSERT INTO t VALUES(zeroblob(?))", (300 * number,))
    data = path.with_name(f"{path.name}-wal").read_bytes()
    connection.close()
    return data


def scan(data: bytes, header: WALHeader) -> Frames:
    return scan_frames(
        data[32:],
        page_size=header.page_size,
        salts=(header.salt1, header.salt2),
        checksum=(header.checksum1, header.checksum2),
        big_endian=header.big_endian,
    )


def rewritten(header: WALHeader, frames: list[tuple[int, int, bytes]], *, big_endian: bool) -> bytes:
    """A WAL with those (pgno, commit, page), summed word by word in either byte order."""
    start = struct.pack(">6I", 0x377F0682 + big_endian, 3007000, header.page_size, 0, header.salt1, header.salt2)
    sums = wal_checksum(start, 0, 0, big_endian=big_endian)
    out = start + struct.pack(">II", *sums)
    for pgno, commit, image in frames:
        head = struct.pack(">II", pgno, commit)
        sums = wal_checksum(head + image, *sums, big_endian=big_endian)
        out += head + struct.pack(">4I", header.salt1, header.salt2, *sums) + image
    return out


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 65536])
def test_all_frames_that_sqlite_wrote_are_valid(tmp_path: Path, page_size: int) -> None:
    data = sqlite_wal(tmp_path / "db", page_size)
    header = decode_wal_header(data)
    assert header.page_size == page_size
    assert header.encode() == data[:32]
    frames = scan(data, header)
    assert len(frames) == frame_count(len(data), page_size) == (len(data) - 32) // (24 + page_size)
    assert frames.committed() == len(frames)
    heads = [decode_frame_header(data, frame_offset(index, page_size)) for index in range(len(frames))]
    assert frames.pgnos.tolist() == [head.pgno for head in heads]
    assert frames.commits.tolist() == [head.commit for head in heads]
    assert frames.checksums.tolist() == [[head.checksum1, head.checksum2] for head in heads]
    assert sum(head.commit != 0 for head in heads) == 13


def test_the_newest_frames_are_the_database_that_a_checkpoint_makes(tmp_path: Path) -> None:
    path = tmp_path / "db"
    data = sqlite_wal(path)  # closing the connection checkpoints
    frames = scan(data, decode_wal_header(data))
    commit = int(frames.commits[-1])
    pgnos, index = newest_frames(frames.pgnos, commit)
    assert pgnos.tolist() == list(range(1, commit + 1))
    images = [data[frame_offset(at, 512) + 24 : frame_offset(at + 1, 512)] for at in index.tolist()]
    assert b"".join(images) == path.read_bytes()


@pytest.mark.parametrize("big_endian", [False, True])
def test_both_byte_orders_are_read(tmp_path: Path, big_endian: bool) -> None:
    data = sqlite_wal(tmp_path / "db")
    frames = [
        (head.pgno, head.commit, data[at + 24 : at + 536]) for at in range(32, len(data), 536) for head in [decode_frame_header(data, at)]
    ]
    other = rewritten(decode_wal_header(data), frames, big_endian=big_endian)
    header = decode_wal_header(other)
    assert header.big_endian is big_endian
    assert len(scan(other, header)) == len(frames) > 12


def test_sqlite_reads_a_wal_that_was_summed_big_endian(tmp_path: Path) -> None:
    """The oracle for big-endian sums: SQLite recovers the frames of a WAL written that way."""
    path = tmp_path / "db"
    data = sqlite_wal(path)
    frames = [
        (head.pgno, head.commit, data[at + 24 : at + 536]) for at in range(32, len(data), 536) for head in [decode_frame_header(data, at)]
    ]
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes()[:512])
    copy.with_name("copy-wal").write_bytes(rewritten(decode_wal_header(data), frames, big_endian=True))
    connection = sqlite3.connect(copy)
    assert connection.execute("SELECT count(*), sum(length(x)) FROM t").fetchone() == (12, 300 * 66)
    connection.close()


@pytest.mark.fault("F12")
@pytest.mark.parametrize("at", [0, 3, 4, 8, 12, 16, 20, 24, 300, 535])
def test_a_damaged_frame_is_the_end(tmp_path: Path, at: int) -> None:
    data = bytearray(sqlite_wal(tmp_path / "db"))
    header = decode_wal_header(bytes(data))
    data[frame_offset(5, 512) + at] ^= 0x10
    assert len(scan(bytes(data), header)) == 5


def test_a_frame_of_page_zero_is_the_end_even_with_a_right_checksum(tmp_path: Path) -> None:
    header = decode_wal_header(sqlite_wal(tmp_path / "db"))
    frames = [(1, 0, bytes(512)), (2, 2, bytes(512)), (0, 1, bytes(512)), (1, 1, bytes(512))]
    data = rewritten(header, frames, big_endian=False)
    assert len(scan(data, decode_wal_header(data))) == 2


@pytest.mark.fault("F12")
def test_frames_of_an_older_run_of_the_wal_are_the_end(tmp_path: Path) -> None:
    """After a checkpoint SQLite starts at the front again, with new salts; the old frames stay behind the new ones."""
    connection = sqlite3.connect(tmp_path / "db", isolation_level=None)
    connection.execute("PRAGMA page_size=512")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(x)")
    connection.execute("INSERT INTO t VALUES(zeroblob(20000))")
    before = len((tmp_path / "db-wal").read_bytes())
    connection.execute("PRAGMA wal_checkpoint(RESTART)")
    connection.execute("INSERT INTO t VALUES(1)")
    data = (tmp_path / "db-wal").read_bytes()
    assert len(data) == before
    frames = scan(data, decode_wal_header(data))
    connection.close()
    assert 0 < len(frames) < 10 < frame_count(before, 512)
    assert frames.committed() == len(frames)


@pytest.mark.fault("F19")
@pytest.mark.parametrize("cut", [1, 24, 535, 536])
def test_a_short_last_frame_is_left_out_and_a_transaction_without_commit_is_not_counted(tmp_path: Path, cut: int) -> None:
    data = sqlite_wal(tmp_path / "db")
    header = decode_wal_header(data)
    whole = scan(data, header)
    frames = scan(data[:-cut], header)
    assert len(frames) == len(whole) - 1
    assert frames.committed() == int(np.flatnonzero(whole.commits[:-1])[-1]) + 1 < len(frames)


def test_nothing_is_no_frames() -> None:
    header = WALHeader(False, 512, 0, 1, 2, 3, 4)
    for data in (b"", bytes(535), bytes(536)):
        frames = scan(bytes(32) + data, header)
        assert len(frames) == frames.committed() == 0
        assert frames.checksums.shape == (0, 2)


def test_a_scan_may_start_in_the_middle_with_the_checksum_of_the_frame_before(tmp_path: Path) -> None:
    data = sqlite_wal(tmp_path / "db")
    header = decode_wal_header(data)
    whole = scan(data, header)
    before = decode_frame_header(data, frame_offset(6, 512))
    rest = scan_frames(
        memoryview(data)[frame_offset(7, 512) :],
        page_size=512,
        salts=(header.salt1, header.salt2),
        checksum=(before.checksum1, before.checksum2),
        big_endian=header.big_endian,
    )
    assert rest.pgnos.tolist() == whole.pgnos[7:].tolist()
    assert (rest.checksums == whole.checksums[7:]).all()


def test_the_values_do_not_hold_on_to_the_buffer(tmp_path: Path) -> None:
    data = sqlite_wal(tmp_path / "db")
    buffer = bytearray(data)
    header = decode_wal_header(data)
    frames = scan_frames(
        memoryview(buffer)[32:],
        page_size=512,
        salts=(header.salt1, header.salt2),
        checksum=(header.checksum1, header.checksum2),
        big_endian=False,
    )
    buffer.clear()  # BufferError when a view is left
    assert frames.pgnos[0] == 1


def test_a_torn_header_is_refused(tmp_path: Path) -> None:
    data = sqlite_wal(tmp_path / "db", transactions=1)
    with pytest.raises(Truncated, match="31 of 32"):
        decode_wal_header(data[:31])
    with pytest.raises(ChecksumMismatch, match="WAL header"):
        decode_wal_header(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    for at in (0, 4):
        with pytest.raises(FormatError, match="not a WAL header"):
            decode_wal_header(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("page_size", [0, 256, 513, 131072])
def test_a_header_with_an_impossible_page_size_is_refused(page_size: int) -> None:
    start = struct.pack(">6I", 0x377F0682, 3007000, page_size, 0, 1, 2)
    with pytest.raises(FormatError, match=f"page size {page_size}"):
        decode_wal_header(start + struct.pack(">II", *wal_checksum(start, 0, 0, big_endian=False)))


def test_frame_headers_are_encoded_as_they_are_decoded() -> None:
    data = bytes(range(24))
    assert decode_frame_header(b"xy" + data, 2) == FrameHeader(0x00010203, 0x04050607, 0x08090A0B, 0x0C0D0E0F, 0x10111213, 0x14151617)
    assert decode_frame_header(data).encode() == data
    with pytest.raises(Truncated, match="23 of 24"):
        decode_frame_header(data, 1)


def test_sizes_and_offsets() -> None:
    assert frame_size(4096) == 4120
    assert [frame_offset(index, 4096) for index in (0, 1, 2)] == [32, 4152, 8272]
    assert [frame_count(size, 4096) for size in (0, 32, 4151, 4152, 8271, 8272)] == [0, 0, 0, 1, 1, 2]


def test_the_newest_frame_of_a_page_wins_and_pages_beyond_the_limit_are_dropped() -> None:
    pgnos, index = newest_frames(np.array([3, 1, 3, 9, 1, 2, 8], dtype=np.uint32), 8)
    assert pgnos.tolist() == [1, 2, 3, 8]
    assert index.tolist() == [4, 5, 2, 6]


@pytest.mark.parametrize("damage", [None, 8, 16, 4, 100, 536 * 3 + 40, 536 * 7 + 16, 536 * 32 + 16, 536 * 34 + 8])
def test_a_few_frames_are_read_as_many_are(tmp_path: Path, damage: int | None) -> None:
    data = bytearray(sqlite_wal(tmp_path / "db"))
    header = decode_wal_header(bytes(data))
    if damage is not None:
        data[32 + damage] ^= 1
    size, salts, checksum = frame_size(header.page_size), (header.salt1, header.salt2), (header.checksum1, header.checksum2)
    assert len(data) > 32 + 38 * size
    for count in (*range(12), *range(30, 38)):
        part = bytes(data[32 : 32 + count * size])
        few = scan(bytes(data[: 32 + count * size]), header)
        many = _scan_many(part, count, page_size=header.page_size, salts=salts, checksum=checksum, big_endian=header.big_endian)
        assert few.pgnos.tolist() == many.pgnos.tolist()
        assert few.commits.tolist() == many.commits.tolist()
        assert few.checksums.tolist() == many.checksums.tolist()
        assert {few.pgnos.dtype.name, few.commits.dtype.name, few.checksums.dtype.name} == {"uint32"}
    if damage is None:
        assert len(scan(bytes(data), header)) > 38


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 40, 256])
def test_the_newest_of_a_few_frames_are_found_as_those_of_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pgnos = np.array([number * 7 % 11 + 1 for number in range(count)], dtype=np.uint32)
    distinct, index = newest_frames(pgnos, 9)
    monkeypatch.setattr("replicator.format.wal.FEW_PAGES", -1)
    expected = newest_frames(pgnos, 9)
    assert distinct.tolist() == expected[0].tolist()
    assert index.tolist() == expected[1].tolist()
    assert (distinct.dtype, index.dtype) == (expected[0].dtype, expected[1].dtype)
