"""The database header, with SQLite as the oracle."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from replicator.errors import FormatError, Truncated
from replicator.format.sqlite import SQLITE_MAGIC, decode_database_header, is_page_size, lock_pgno


def database(path: Path, page_size: int, *, wal: bool = False) -> tuple[bytes, int]:
    """First 100 bytes of a new database, and the page count that SQLite reports."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA page_size={page_size}")
    if wal:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(x)")
    connection.execute("INSERT INTO t VALUES(randomblob(100000))")
    connection.commit()
    [(count,)] = connection.execute("PRAGMA page_count")
    connection.close()
    return path.read_bytes()[:100], count


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
@pytest.mark.parametrize("wal", [False, True])
def test_the_header_says_what_sqlite_says(tmp_path: Path, page_size: int, wal: bool) -> None:
    data, count = database(tmp_path / "db", page_size, wal=wal)
    header = decode_database_header(data)
    assert (header.page_size, header.page_count, header.is_wal) == (page_size, count, wal)
    assert header.size_is_valid
    major, minor, patch = sqlite3.sqlite_version_info
    assert header.sqlite_version == major * 1_000_000 + minor * 1000 + patch


def test_the_size_is_not_valid_when_another_library_changed_the_file_since(tmp_path: Path) -> None:
    data, _ = database(tmp_path / "db", 4096)
    newer = data[:24] + (int.from_bytes(data[24:28], "big") + 1).to_bytes(4, "big") + data[28:]
    assert not decode_database_header(newer).size_is_valid


def test_bytes_that_are_no_header_are_refused() -> None:
    with pytest.raises(Truncated, match="99 of 100"):
        decode_database_header(SQLITE_MAGIC + bytes(83))
    with pytest.raises(FormatError, match="wrong magic"):
        decode_database_header(b"SQLite format 4\0" + bytes(84))


@pytest.mark.parametrize("stored", [0, 2, 256, 513, 4095, 0xFFFF])
def test_a_page_size_that_sqlite_cannot_have_is_refused(stored: int) -> None:
    with pytest.raises(FormatError, match="page size"):
        decode_database_header(SQLITE_MAGIC + stored.to_bytes(2, "big") + bytes(82))


def test_page_sizes_are_the_powers_of_two_from_512_to_65536() -> None:
    assert [size for size in range(-1, 131073) if is_page_size(size)] == [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]


@pytest.mark.parametrize(("page_size", "pgno"), [(512, 2097153), (4096, 262145), (65536, 16385)])
def test_the_lock_page_is_the_one_that_holds_the_byte_at_one_gib(page_size: int, pgno: int) -> None:
    assert lock_pgno(page_size) == pgno
    assert (pgno - 1) * page_size <= 0x40000000 < pgno * page_size
