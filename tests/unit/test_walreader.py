"""Reading a WAL while a writer goes on: what counts as its end, and how much is read for it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replicator import walreader
from replicator.format.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE, frame_size
from replicator.tail import WALPosition, start_of
from replicator.walreader import Changes, WALFile

PAGE_SIZE = 4096
FRAME = frame_size(PAGE_SIZE)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("CREATE TABLE t(x)")
    yield connection
    connection.close()


@pytest.fixture
def wal(tmp_path: Path, writer: sqlite3.Connection) -> Iterator[WALFile]:
    with WALFile(tmp_path / "a.db-wal") as opened:
        yield opened


def read(wal: WALFile, position: WALPosition | None = None) -> Changes | None:
    header = wal.header()
    assert header is not None
    return wal.changes(position or start_of(header), page_size=PAGE_SIZE, big_endian=header.big_endian)


def insert(writer: sqlite3.Connection, count: int) -> None:
    for _ in range(count):
        writer.execute("INSERT INTO t VALUES('row')")


def spy(monkeypatch: pytest.MonkeyPatch, seen: Callable[[int], None]) -> None:
    """Call `seen` with the size that was asked for after each read of the WAL."""

    def pread(file: int, size: int, offset: int, real: Callable[[int, int, int], bytes] = os.pread) -> bytes:
        data = real(file, size, offset)
        seen(size)
        return data

    monkeypatch.setattr(walreader.os, "pread", pread)


@pytest.mark.parametrize("found", [0, 3])
def test_a_frame_that_is_written_after_the_read_is_no_wrong_one(
    found: int, writer: sqlite3.Connection, wal: WALFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each look beside a busy writer would be in doubt about the end, and be done again."""
    before = read(wal)
    assert before is not None
    insert(writer, found)
    spy(monkeypatch, lambda size: insert(writer, 1) if size >= FRAME else None)
    changes = read(wal, before.end)
    assert (changes.frames if changes is not None else 0) == found
    assert not wal.wrong_frame


@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize("size", [FRAME_HEADER_SIZE, FRAME - 1, FRAME, 3 * FRAME])
def test_a_frame_with_the_salts_and_not_the_checksum_is_a_wrong_one(
    good: int, size: int, writer: sqlite3.Connection, wal: WALFile, tmp_path: Path
) -> None:
    """Whole or not: an open transaction writes there, or it is damaged."""
    before = read(wal)
    assert before is not None
    insert(writer, good)
    whole = (tmp_path / "a.db-wal").read_bytes()
    with (tmp_path / "a.db-wal").open("ab") as file:
        file.write((whole[WAL_HEADER_SIZE : WAL_HEADER_SIZE + FRAME] * 3)[:size])  # a frame of this WAL, at a place that is not its own
    changes = read(wal, before.end)
    assert (changes.frames if changes is not None else 0) == good
    assert wal.wrong_frame


def test_less_than_a_frame_header_is_no_frame(writer: sqlite3.Connection, wal: WALFile, tmp_path: Path) -> None:
    whole = (tmp_path / "a.db-wal").read_bytes()
    with (tmp_path / "a.db-wal").open("ab") as file:
        file.write(whole[WAL_HEADER_SIZE : WAL_HEADER_SIZE + FRAME_HEADER_SIZE - 1])
    assert read(wal) is not None
    assert not wal.wrong_frame


def test_what_comes_regularly_is_read_in_one_piece(writer: sqlite3.Connection, wal: WALFile, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    position = None
    for _ in range(2):
        insert(writer, 100)
        changes = read(wal, position)
        assert changes is not None
        position = changes.end
    spy(monkeypatch, sizes.append)
    insert(writer, 100)
    changes = read(wal, position)
    assert changes is not None
    assert changes.frames == 100
    reads = [size for size in sizes if size >= FRAME]
    assert len(reads) == 1
    assert reads[0] < 130 * FRAME  # behind the end of a WAL that was restarted lies the old one


def test_a_new_header_is_seen(writer: sqlite3.Connection, wal: WALFile) -> None:
    first = wal.header()
    assert first is not None
    assert wal.header() == first
    writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    insert(writer, 1)
    second = wal.header()
    assert second is not None
    assert second.salt2 != first.salt2
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert wal.header() is None
