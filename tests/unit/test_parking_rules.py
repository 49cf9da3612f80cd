"""What proves that a parked database has not changed, and what does not. The WALs are SQLite's own."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from replicator import parked
from replicator.errors import FormatError
from replicator.format.ltx import TXID
from replicator.parking import RACY_NS, FileMark, Parked, Sight, WALEnd, changed, decode, encode, is_settled, wal_moved
from replicator.tail import NO_WAL, WALPosition
from replicator.walreader import WALFile
from tests.e2e.databases import connect, insert

MARK = FileMark(1, 2, 3, 4, 5)
RECORD = Parked(TXID(7), Sight(MARK, None), NO_WAL, 4096, 5 + RACY_NS, "boot", ("file:///r",), 12.5, ("file:///r: snapshot: no",))
NOTHING = WALEnd(None, None, None)


def test_a_record_is_read_as_it_was_written() -> None:
    assert decode(encode(RECORD)) == RECORD
    record = replace(RECORD, sight=Sight(MARK, replace(MARK, inode=9)), position=WALPosition((1, 2), 4152, (3, 4)), history_due=None)
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b"null", encode(RECORD)[:-20], encode(RECORD).replace(b'"version": 1', b'"version": 2')]
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)


def test_an_untouched_database_has_not_changed() -> None:
    assert changed(RECORD, RECORD.sight, NOTHING, boot="boot") == ""


@pytest.mark.parametrize("field", ["device", "inode", "size", "mtime_ns", "ctime_ns"])
def test_any_difference_of_the_file_counts(field: str) -> None:
    other = replace(MARK, **{field: 99})
    assert "database file" in changed(RECORD, Sight(other, None), NOTHING, boot="boot")
    assert "WAL" in changed(RECORD, Sight(MARK, other), NOTHING, boot="boot")


def test_a_glance_sees_what_a_look_sees(tmp_path: Path) -> None:
    """A glance is what tells a minute later that nothing has changed: any difference must be in it."""
    path, seen = tmp_path / "a.db", set[bytes]()

    def glance() -> None:
        found = parked.glance(path)
        assert found == parked.look(path).packed()
        assert found not in seen
        seen.add(found)

    glance()
    for name in ("a.db", "a.db-wal", "a.db-journal"):
        (tmp_path / name).touch()
        glance()
    for name in ("a.db", "a.db-wal"):
        (tmp_path / name).write_bytes(b"x")
        glance()
        os.utime(tmp_path / name, ns=(0, -5))
        glance()
        os.replace(shutil.copy(tmp_path / name, tmp_path / "copy"), tmp_path / name)
        glance()
    (tmp_path / "a.db-wal").unlink()
    glance()
    (tmp_path / "a.db-wal").mkdir()
    assert parked.glance(path) in seen  # as if there were none


def test_a_journal_or_a_missing_file_count() -> None:
    assert "journal" in changed(RECORD, Sight(MARK, None, True), NOTHING, boot="boot")
    assert "not there" in changed(RECORD, Sight(None, None), NOTHING, boot="boot")


def test_a_record_that_was_made_within_the_grain_of_times_is_none() -> None:
    """The next write may have left no trace in them."""
    assert "too soon" in changed(replace(RECORD, taken_ns=5 + RACY_NS - 1), RECORD.sight, NOTHING, boot="boot")
    assert is_settled(RECORD.sight, 5 + RACY_NS)
    assert not is_settled(RECORD.sight, 4 + RACY_NS)


@pytest.mark.parametrize(("written", "now"), [("boot", "other"), ("boot", ""), ("", "")])
def test_without_a_wal_a_record_of_another_boot_proves_nothing(written: str, now: str) -> None:
    """A power cut may keep a write and lose its time."""
    assert "anew" in changed(replace(RECORD, boot=written), RECORD.sight, NOTHING, boot=now)


# -- with SQLite's own WAL ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


def position_of(database: Path) -> WALPosition:
    with WALFile(database.with_name("a.db-wal")) as wal:
        header = wal.header()
        assert header is not None
        start = WALPosition((header.salt1, header.salt2), 32, (header.checksum1, header.checksum2))
        found = wal.changes(start, page_size=4096, big_endian=header.big_endian)
        assert found is not None
        return found.end


def grows(connection: sqlite3.Connection) -> None:
    insert(connection, 1)


def restarts_short(connection: sqlite3.Connection) -> None:
    assert connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
    insert(connection, 1)


def truncates(connection: sqlite3.Connection) -> None:
    assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def leaves_it(connection: sqlite3.Connection) -> None:
    connection.execute("DROP TABLE t")
    assert connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0] == "delete"


@pytest.mark.parametrize("change", [grows, restarts_short, truncates, leaves_it])
def test_the_wal_itself_shows_what_happened_whatever_the_times_say(database: Path, change: Callable[[sqlite3.Connection], None]) -> None:
    connection = connect(database, autocheckpoint=0)
    insert(connection, 50)
    position = position_of(database)
    assert wal_moved(position, parked.wal_end(database, position, 4096)) == ""
    change(connection)
    assert wal_moved(position, parked.wal_end(database, position, 4096)) != ""
    connection.close()


def test_remnants_of_an_older_wal_behind_the_end_are_no_commits(database: Path) -> None:
    connection = connect(database, autocheckpoint=0)
    insert(connection, 200)
    restarts_short(connection)
    position = position_of(database)
    end = parked.wal_end(database, position, 4096)
    assert end.following is not None  # there is something
    assert wal_moved(position, end) == ""
    connection.close()


def test_a_passive_checkpoint_is_no_change_of_the_wal(database: Path) -> None:
    connection = connect(database, autocheckpoint=0)
    insert(connection, 50)
    position = position_of(database)
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    assert wal_moved(position, parked.wal_end(database, position, 4096)) == ""
    connection.close()


def test_a_copy_with_the_same_bytes_and_times_is_another_file(database: Path) -> None:
    connect(database).close()
    before = parked.look(database)
    copy = database.with_name("copy")
    shutil.copy2(database, copy)
    os.replace(copy, database)
    after = parked.look(database)
    assert after.database is not None
    assert before.database is not None
    assert after.database.mtime_ns == before.database.mtime_ns
    assert "touched" in changed(replace(RECORD, sight=before, taken_ns=time.time_ns() + RACY_NS), after, NOTHING, boot="boot")


def test_records_on_the_disk(tmp_path: Path) -> None:
    assert parked.read_record(tmp_path) is None
    parked.write_record(tmp_path, RECORD)
    assert parked.read_record(tmp_path) == RECORD
    (tmp_path / "parked.json").write_bytes(b"{")
    assert parked.read_record(tmp_path) is None
    parked.forget(tmp_path)
    parked.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
