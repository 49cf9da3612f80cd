"""Where frames of the WAL can get lost: at the start, in a checkpoint, when a frame is damaged, when files are replaced.

Each test drives an engine without threads, or a `Replicator` that is held for a moment, through one interleaving that once lost something.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from replicator import Replicator, db, engine, walreader
from replicator.checkpoint import CheckpointPolicy
from replicator.db import Database
from replicator.errors import DatabaseNotFound, DatabaseStateError
from replicator.format.ltx import decode_file
from replicator.snapshot import Snapshot
from replicator.storage.memory import MemoryClient
from replicator.walreader import WALFile
from tests.e2e.databases import checkpointed_bytes, connect, drain, engine_for, insert, restored, rows

TIMEOUT_S = 20
FRAME = 4096 + 24


def wal_of(database: Path) -> Path:
    return database.with_name(database.name + "-wal")


def flip_a_bit_of_frame(database: Path, number: int) -> None:
    """Damage the page image of a frame, counted from 0. SQLite does not check frames that it finds by the wal-index."""
    with wal_of(database).open("r+b") as file:
        file.seek(32 + number * FRAME + 24 + 3000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def frames_in(database: Path) -> int:
    return (wal_of(database).stat().st_size - 32) // FRAME


class RaisesOnce:
    """A connection whose checkpoint does its work and then fails, the first time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.failed = False

    def execute(self, sql: str) -> sqlite3.Cursor:
        if "wal_checkpoint" in sql and not self.failed:
            self.failed = True
            self.connection.execute(sql).fetchall()
            raise sqlite3.OperationalError("disk I/O error")
        return self.connection.execute(sql)

    def close(self) -> None:
        self.connection.close()


# -- names -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F22")
def test_a_database_behind_a_symbolic_link_is_replicated(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    database, client = tmp_path / "real/a.db", MemoryClient()
    application = connect(database)
    (tmp_path / "link.db").symlink_to(database)
    with Replicator(tmp_path / "link.db", client) as replicator:
        insert(application, 20)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert rows(restored(client, tmp_path)) == rows(application)
    application.close()


@pytest.mark.fault("F22")
def test_a_database_with_two_names_is_refused(tmp_path: Path) -> None:
    connect(tmp_path / "a.db").close()
    os.link(tmp_path / "a.db", tmp_path / "b.db")
    with pytest.raises(DatabaseStateError, match="2 names"):
        Replicator(tmp_path / "b.db", MemoryClient()).start()


# -- the first sync after a start ------------------------------------------------------------------------------------------------


@pytest.mark.fault("F11")
@pytest.mark.parametrize("moment", ["before the scan", "after the scan"])
def test_a_wal_that_restarts_during_the_first_scan_loses_nothing(tmp_path: Path, moment: str) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    first = engine_for(database, client)
    first.open()
    drain(first)
    first.close()
    insert(application, 100)  # while nobody watches; then all of it is copied, so that the next writer restarts the WAL
    application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    second = engine_for(database, client)
    second.open()
    changes, commits = second._database.changes, []

    def racing(*args, **options):
        if moment == "after the scan":
            found = changes(*args, **options)
        if not commits:
            commits.append(application.execute("INSERT INTO t(v) VALUES('restarts the WAL')"))
        return found if moment == "after the scan" else changes(*args, **options)

    second._database.changes = racing  # type: ignore[method-assign]
    drain(second)
    drain(second)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    second.close()
    application.close()


@pytest.mark.fault("F11")
def test_what_the_first_scan_read_and_could_not_encode_is_not_skipped_when_the_wal_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    first = engine_for(database, client)
    first.open()
    drain(first)
    first.close()
    insert(application, 100)
    application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    second = engine_for(database, client)
    second.open()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "encode", lambda *args, **options: (_ for _ in ()).throw(OSError(errno.ENOSPC, "the disk is nearly full")))
        with pytest.raises(OSError, match="nearly full"):
            second.advance()
    application.execute("INSERT INTO t(v) VALUES('restarts the WAL')")
    drain(second)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    second.close()
    application.close()


# -- checkpoints -----------------------------------------------------------------------------------------------------------------


def test_the_tail_is_not_lost_when_the_checkpoint_fails_after_copying(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    insert(application, 50)
    drain(subject)
    insert(application, 50)  # found under the write lock
    subject._database._copier = RaisesOnce(subject._database._checkpointer)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError):
        subject.checkpoint()
    application.execute("UPDATE t SET v = 'restarts the WAL' WHERE id = 1")
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


def test_a_pin_that_cannot_be_taken_again_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    insert(application, 50)
    drain(subject)
    assert subject.checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(db, "_begin_read", lambda connection: (_ for _ in ()).throw(sqlite3.OperationalError("unable to open database file")))
        with pytest.raises(sqlite3.OperationalError):
            subject.checkpoint()
    insert(application, 20)
    application.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    application.execute("UPDATE t SET v = 'restarts the WAL once more' WHERE id = 1")
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


def test_a_connection_that_was_left_in_a_transaction_is_used_again(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    subject._database._unpin()
    subject._database._ensure_spare()
    for connection in (subject._database._pin, subject._database._spare):
        connection.execute("BEGIN")  # the read that should follow failed
    insert(application, 5)
    subject._resync_reason = "a test"
    drain(subject)
    assert subject.checkpoint()
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


def test_a_writer_is_let_go_when_its_rollback_fails(tmp_path: Path) -> None:
    class NoRollback(RaisesOnce):
        def execute(self, sql: str) -> sqlite3.Cursor:
            if sql == "ROLLBACK":
                raise sqlite3.OperationalError("disk I/O error")
            return self.connection.execute(sql)

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    subject = engine_for(database, client)
    subject.open()
    insert(application, 5)
    drain(subject)
    writer = NoRollback(subject._database._writer)
    subject._database._connections[subject._database._connections.index(subject._database._writer)] = writer  # type: ignore[call-overload]
    subject._database._writer = writer  # type: ignore[assignment]
    with contextlib.suppress(sqlite3.Error):
        subject.checkpoint()
    application.execute("PRAGMA busy_timeout=0")
    application.execute("INSERT INTO t(v) VALUES('not locked')")
    subject.close()
    application.close()


@pytest.mark.fault("F26")
def test_a_write_lock_that_was_taken_and_reported_as_failed_is_let_go(tmp_path: Path) -> None:
    class Begun(RaisesOnce):
        @property
        def in_transaction(self) -> bool:
            return self.connection.in_transaction

        def execute(self, sql: str) -> sqlite3.Cursor:
            found = self.connection.execute(sql)
            if sql == "BEGIN IMMEDIATE" and not self.failed:
                self.failed = True
                raise sqlite3.OperationalError("disk I/O error")
            return found

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    subject = engine_for(database, client)
    subject.open()
    insert(application, 5)
    drain(subject)
    subject._database._writer = Begun(subject._database._writer)  # type: ignore[assignment]
    assert not subject.checkpoint()
    application.execute("PRAGMA busy_timeout=0")
    application.execute("INSERT INTO t(v) VALUES('not locked')")
    drain(subject)
    assert subject.checkpoint()
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.fault("F15")
@pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
def test_checkpoints_of_others_after_one_of_ours_lose_nothing(tmp_path: Path, mode: str) -> None:
    """The next writer restarts the WAL once, and may: all of it is copied. It must not be restarted again before it is read."""
    database, client = tmp_path / "a.db", MemoryClient()
    application, other = connect(database, autocheckpoint=0), connect(database, autocheckpoint=0)
    insert(application, 60, size=3000)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    assert subject.checkpoint()
    other.execute("PRAGMA busy_timeout=0")
    for number in (1, 20, 40):  # pages of their own
        application.execute("UPDATE t SET v = randomblob(3000) WHERE id = ?", (number,))
        other.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
    application.execute("UPDATE t SET v = randomblob(3000) WHERE id = 60")
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    for connection in (application, other):
        connection.close()


@pytest.mark.fault("F14")
def test_a_long_reader_holds_up_neither_a_checkpoint_nor_a_writer(tmp_path: Path) -> None:
    """What the reader needs stays in the WAL, and the next checkpoint after it takes all."""
    database, client = tmp_path / "a.db", MemoryClient()
    application, reader = connect(database, autocheckpoint=0), connect(database)
    subject = engine_for(database, client, busy_timeout_s=30)
    subject.open()
    drain(subject)
    reader.execute("BEGIN")
    assert rows(reader) == []
    insert(application, 2 * db.COPY_PASS_PAGES, size=3000)
    drain(subject)
    application.execute("PRAGMA busy_timeout=5000")
    done = threading.Event()

    def write() -> None:
        writer = connect(database, autocheckpoint=0)
        writer.execute("PRAGMA busy_timeout=5000")
        while not done.wait(0.001):
            writer.execute("UPDATE t SET v = 1 WHERE id = 1")  # fails where it has to wait for the reader
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            began = time.monotonic()
            assert not subject.checkpoint()
            assert time.monotonic() - began < 5  # and not the half minute for which a blocking one would wait
            drain(subject)
    finally:
        done.set()
        thread.join()
    assert rows(reader) == []
    reader.close()
    drain(subject)
    assert any(subject.checkpoint() for _ in range(3))  # bulk first, the rest under the lock
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.fault("F26")
def test_the_write_lock_is_not_held_for_reading_a_long_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    lock, read, under_lock = Database._lock_writers, WALFile.changes, []

    def much() -> None:
        for _ in range(30):
            insert(application, 1, size=1 << 20)

    def locking(self):
        if not under_lock:
            much()  # after all that was read ahead
        under_lock.append(0)
        return lock(self)

    def reading(self, *args, **options):
        found = read(self, *args, **options)
        if under_lock and found is not None:
            under_lock.append(found.frames * FRAME)
        return found

    monkeypatch.setattr(Database, "_lock_writers", locking)
    monkeypatch.setattr(WALFile, "changes", reading)
    insert(application, 40)
    assert not subject.checkpoint()
    assert len(under_lock) > 1
    assert max(under_lock) < 16 << 20
    drain(subject)
    much()
    under_lock.clear()
    assert not subject.checkpoint()
    assert not under_lock  # it is seen before
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.fault("F11")
def test_what_is_committed_while_a_checkpoint_prepares_is_read_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the WAL is read before the lock, the rest under it: both are one transaction file, without a gap between them."""
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    lock, states = Database._lock_writers, []

    def locking(self):
        for _ in range(3):
            insert(application, 10)
            states.append(rows(application))
        return lock(self)

    insert(application, 40)
    drain(subject)
    before = subject.txid
    insert(application, 400)  # read ahead, on pages that the rest does not touch
    monkeypatch.setattr(Database, "_lock_writers", locking)
    assert subject.checkpoint()
    monkeypatch.undo()
    insert(application, 5)  # restarts the WAL: what was read is nowhere else
    drain(subject)
    assert rows(restored(client, tmp_path, txid=before + 1)) == states[-1]
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.fault("F15")
def test_a_checkpoint_waits_for_that_of_the_application(tmp_path: Path) -> None:
    """It cannot begin another one while writers wait for us. SQLite answers (1, -1, -1) as long as it runs."""

    class BusyAtFirst(RaisesOnce):
        left = 3

        def execute(self, sql: str) -> sqlite3.Cursor:
            if "wal_checkpoint" in sql and self.left:
                self.left -= 1
                sql = "SELECT 1, -1, -1"
            return self.connection.execute(sql)

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    insert(application, 40)
    drain(subject)
    subject._database._copier = BusyAtFirst(subject._database._checkpointer)  # type: ignore[assignment]
    assert subject.checkpoint()
    subject._database._checkpointer.left = 10**9  # type: ignore[attr-defined]
    insert(application, 40)
    drain(subject)
    began = time.monotonic()
    assert not subject.checkpoint()
    assert time.monotonic() - began < 5  # and writers go on
    insert(application, 1)
    subject.close()
    application.close()


@pytest.mark.fault("F15")
def test_others_can_copy_again_before_an_upload_has_ended(tmp_path: Path) -> None:
    """After a checkpoint of ours the pin keeps others from copying, until the WAL was restarted and the pin has moved."""

    class Held(MemoryClient):
        free = threading.Event()

        def put(self, *args, **options):
            assert self.free.wait(TIMEOUT_S)
            return super().put(*args, **options)

    database, client = tmp_path / "a.db", Held()
    client.free.set()
    application = connect(database, autocheckpoint=0)
    with Replicator(database, client, sync_interval_s=0.01, min_checkpoint_pages=20) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        insert(application, 300)
        end = time.monotonic() + TIMEOUT_S
        while not replicator.status().checkpoints:
            assert time.monotonic() < end
            time.sleep(0.005)
        replicator.wait(timeout_s=TIMEOUT_S)
        client.free.clear()
        insert(application, 5)
        copied = 0
        while not copied and time.monotonic() < end:
            _, _, copied = application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        client.free.set()
        assert copied
    application.close()


def test_a_checkpoint_that_is_complete_is_not_due_again_for_what_it_read(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client, policy=CheckpointPolicy(min_pages=10))
    subject.open()
    drain(subject)
    insert(application, 300)
    drain(subject)
    assert subject.checkpoint_due()
    insert(application, 300)  # the checkpoint reads it
    assert subject.checkpoint()
    assert subject.has_tail
    drain(subject)
    assert not subject.checkpoint_due()
    insert(application, 300)
    drain(subject)
    assert subject.checkpoint_due()
    subject.close()
    application.close()


def test_a_writer_that_changes_much_does_not_keep_a_checkpoint_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are copied while it goes on, a few times; then the rest is copied under the lock, however much that is."""
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    insert(application, 2 * db.COPY_PASS_PAGES, size=3000)
    subject = engine_for(database, client, policy=CheckpointPolicy(min_pages=10))
    subject.open()
    drain(subject)
    for attempt in range(1, engine.MAX_PASSES + 2):
        application.execute("UPDATE t SET v = randomblob(3000)")
        drain(subject)
        assert subject.checkpoint_due()
        assert subject.checkpoint() is (attempt > engine.MAX_PASSES)
        assert subject.is_checkpointing is (attempt <= engine.MAX_PASSES)
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.parametrize("format", ["ltx", "v0.3"])
def test_what_was_read_ahead_in_stretches_is_one_transaction_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Pages that grow, change again and are cut off between the stretches."""
    monkeypatch.setattr(db, "LOCKED_READ_BYTES", 40 * FRAME)
    monkeypatch.setattr(db, "FEW_FRAMES", 0)
    monkeypatch.setattr(walreader, "NEXT_READ", 40 * FRAME)
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database, autocheckpoint=0, auto_vacuum="FULL")
    with Replicator(database, url, format=format, sync_interval_s=60) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        insert(application, 10)
        replicator.wait(timeout_s=TIMEOUT_S)
        subject, before = replicator._engine, replicator.status().txid
        with subject.lock:
            for number in range(12):
                insert(application, 60, size=1000)
                application.execute("UPDATE t SET v = randomblob(900) WHERE id % 7 = ?", (number % 7,))
                application.execute("DELETE FROM t WHERE id > 10 AND id % 5 = ?", (number % 5,))
            assert subject.checkpoint()
            assert subject.has_tail
            insert(application, 1)  # restarts the WAL
        replicator.wait(timeout_s=TIMEOUT_S)
        assert replicator.status().txid == before + 2
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_the_frames_of_an_old_wal_behind_the_end_are_not_read_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    insert(application, 1500, size=3900)
    drain(subject)
    assert any(subject.checkpoint() for _ in range(3))
    for _ in range(30):  # more than one reading of the first size
        insert(application, 1)
    assert wal_of(database).stat().st_size > 6_000_000
    pread, sizes = os.pread, []

    def counting(*args: int) -> bytes:
        data = pread(*args)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    drain(subject)
    monkeypatch.undo()
    assert 120_000 < sum(sizes) < 600_000
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()
    application.close()


@pytest.mark.fault("F14")
def test_a_reader_that_stays_is_not_met_at_every_look(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application, reader = connect(database, autocheckpoint=0), connect(database)
    subject = engine_for(database, client, policy=CheckpointPolicy(min_pages=10))
    subject.open()
    drain(subject)
    reader.execute("BEGIN")
    assert rows(reader) == []
    insert(application, 300)
    drain(subject)
    assert subject.checkpoint_due()
    assert not subject.checkpoint()
    assert not subject.checkpoint_due()
    subject.close()
    for connection in (reader, application):
        connection.close()


# -- damage ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F19")
@pytest.mark.parametrize("damaged", [0, 7])
def test_a_damaged_frame_is_not_taken_for_the_end_of_the_wal(tmp_path: Path, damaged: int) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    with Replicator(database, client, sync_interval_s=30) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        with replicator._engine.lock:
            before = frames_in(database)
            for _ in range(10):
                insert(application, 1, size=3900)
            flip_a_bit_of_frame(database, before + 2 * damaged + 1)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert rows(restored(client, tmp_path)) == rows(application)
        insert(application, 3)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert rows(restored(client, tmp_path)) == rows(application)
    application.close()


@pytest.mark.parametrize("known", [False, True])
def test_a_frame_that_was_damaged_before_the_start_is_not_the_end_either(tmp_path: Path, known: bool) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    if known:
        with Replicator(database, client):
            pass
    before = frames_in(database)
    for _ in range(10):
        insert(application, 1, size=3900)
    flip_a_bit_of_frame(database, before + 9)
    application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    with Replicator(database, client) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        assert rows(restored(client, tmp_path)) == rows(application)
        for txid in range(1, replicator.status().txid + 1):
            restored(client, tmp_path, txid=txid)
    application.close()


def test_nothing_is_acknowledged_while_a_damaged_frame_cannot_be_told_from_the_end(tmp_path: Path) -> None:
    class Busy(RaisesOnce):
        def execute(self, sql: str) -> sqlite3.Cursor:
            if "wal_checkpoint" in sql:
                sql = "SELECT 1, -1, -1"  # what SQLite answers while another process checkpoints
            return self.connection.execute(sql)

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    before = frames_in(database)
    insert(application, 1, size=3900)
    flip_a_bit_of_frame(database, before)
    free = subject._database._checkpointer
    subject._database._copier = Busy(free)  # type: ignore[assignment]
    with pytest.raises(DatabaseStateError, match="cannot tell"):
        subject.advance()
    subject._database._copier = free
    drain(subject)
    drain(subject)
    assert rows(restored(client, tmp_path)) == rows(application)
    subject.close()
    application.close()


def test_a_damaged_frame_where_a_remnant_was_before_is_noticed(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    reader = connect(database)
    reader.execute("BEGIN")
    rows(reader)  # the WAL cannot be restarted
    application.execute("PRAGMA cache_size=2")
    with Replicator(database, client, sync_interval_s=30) as replicator:
        application.execute("BEGIN")
        application.executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(3000,)] * 50)
        application.execute("ROLLBACK")
        insert(application, 1)
        replicator.wait(timeout_s=TIMEOUT_S)  # the remnant was looked at
        with replicator._engine.lock:
            insert(application, 1, size=3900)
            flip_a_bit_of_frame(database, (replicator.status().wal_size_bytes - 32) // FRAME + 1)
        reader.close()
        replicator.wait(timeout_s=TIMEOUT_S)
        assert rows(restored(client, tmp_path)) == rows(application)
    application.close()


def test_remnants_of_a_rolled_back_transaction_do_not_hold_up_an_acknowledgement(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    application.execute("PRAGMA cache_size=2")  # spills into the WAL
    with Replicator(database, client, sync_interval_s=30) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        with replicator._engine.lock:
            application.execute("BEGIN")
            application.executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(3000,)] * 50)
            application.execute("ROLLBACK")
            insert(application, 1)
        for _ in range(3):
            replicator.wait(timeout_s=TIMEOUT_S)
            assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
            insert(application, 1)
        assert replicator.status().error is None
    application.close()


# -- replaced files --------------------------------------------------------------------------------------------------------------


def test_a_snapshot_during_which_the_database_is_deleted_is_not_stored(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    insert(application, 1000, size=3000)
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    application.execute("UPDATE t SET v = zeroblob(3000)")  # the newest images are in the WAL only
    drain(subject)
    pages, calls = subject._database.pages, []

    def deleting(*args):
        calls.append(args)
        if len(calls) == 3:
            for suffix in ("", "-wal", "-shm"):
                database.with_name(database.name + suffix).unlink()
            with contextlib.suppress(DatabaseNotFound):
                subject.advance()
        return pages(*args)

    subject._database.pages = deleting  # type: ignore[method-assign]
    with pytest.raises(DatabaseStateError):
        subject.snapshot()
    subject.close()
    application.close()


@pytest.mark.fault("F17")
def test_a_database_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    insert(application, 20)
    other = connect(tmp_path / "other.db")
    insert(other, 7)
    other.close()
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    insert(application, 5)
    changes = subject._database.changes

    def replacing(*args, **options):
        found = changes(*args, **options)
        if (tmp_path / "other.db").exists():
            application.close()
            for suffix in ("-wal", "-shm"):
                database.with_name(database.name + suffix).unlink(missing_ok=True)
            os.replace(tmp_path / "other.db", database)
        return found

    subject._database.changes = replacing  # type: ignore[method-assign]
    with pytest.raises(DatabaseStateError):
        subject.advance()
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    subject.close()


def test_a_wal_that_is_deleted_under_the_engine_is_noticed(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    subject = engine_for(database, client)
    subject.open()
    insert(application, 50)
    drain(subject)
    application.close()
    wal_of(database).unlink()  # and with it the rows
    drain(subject)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    assert rows(tmp_path / "restored.db") == []
    subject.close()


# -- snapshots -------------------------------------------------------------------------------------------------------------------


def test_two_snapshots_at_once_do_not_spoil_each_other(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    insert(application, 4000, size=3000)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    both, made = threading.Barrier(2, timeout=TIMEOUT_S), []
    pages = subject._database.pages

    def meeting(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()  # neither is far ahead of the other
        return pages(*args)

    subject.lock = contextlib.nullcontext()  # type: ignore[assignment]  nothing else runs; the two must overlap
    subject._database.pages = meeting  # type: ignore[method-assign]
    threads = [threading.Thread(target=lambda: made.append(subject.snapshot())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert all(isinstance(out.body, Path) for out in made)
    assert len({out.body.read_bytes() for out in made}) <= 2
    for out in made:
        out.body.unlink()
        assert not out.body.exists()
    subject.close()
    application.close()


class Contended:
    """A connection whose checkpoints meet those of somebody else: what SQLite answers then."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def execute(self, sql: str) -> sqlite3.Cursor:
        return self.connection.execute("SELECT 1, -1, -1" if "wal_checkpoint" in sql else sql)

    def close(self) -> None:
        self.connection.close()


@pytest.mark.fault("F13")
@pytest.mark.parametrize(("version", "warnings"), [("3.51.2", 1), ("3.51.3", 0)])
def test_checkpoints_of_others_are_warned_about_where_sqlite_has_the_wal_reset_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, warnings: int
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", tuple(map(int, version.split("."))))
    monkeypatch.setattr(sqlite3, "sqlite_version", version)
    database = tmp_path / "a.db"
    application = connect(database)
    engine = engine_for(database, MemoryClient())
    engine.open()
    drain(engine)
    assert engine.checkpoint()
    real = engine._database._checkpointer
    engine._database._copier = Contended(real)
    for _ in range(2):  # it is said once
        insert(application, 3)
        drain(engine)
        assert not engine.checkpoint()
    engine._database._copier = real
    assert engine.checkpoint()
    said = [record.getMessage() for record in caplog.records if "WAL-reset" in record.getMessage()]
    assert len(said) == warnings
    assert all(f"db={database} sqlite={version}" in text for text in said)
    engine.close()
    application.close()


def test_growth_without_a_frame_comes_from_the_database_file(tmp_path: Path) -> None:
    """SQLite gives each page a frame, but for the lock page; other writers need not."""
    database = tmp_path / "a.db"
    application = connect(database, page_size=512)
    engine = engine_for(database, MemoryClient())
    engine.open()
    drain(engine)
    assert engine.checkpoint()
    pages = database.stat().st_size // 512
    with database.open("ab") as file:
        for number in range(1, 5):
            file.write(bytes([number]) * 512)
    changes = SimpleNamespace(page_size=512, commit=pages + 4, pgnos=np.array([1, pages + 2], dtype=np.uint32), start=engine._position)
    found = list(engine._with_growth(iter([(1, b"first"), (pages + 2, b"its frame")]), changes))
    assert found == [
        (1, b"first"), (pages + 1, b"\1" * 512), (pages + 2, b"its frame"), (pages + 3, b"\3" * 512), (pages + 4, b"\4" * 512)
    ]  # fmt: skip
    engine.close()
    application.close()


def test_a_snapshot_keeps_what_a_checkpoint_reads_ahead_and_copies(tmp_path: Path) -> None:
    """Everything changes once the snapshot has read its first slice, and a checkpoint takes all of it at once."""
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, autocheckpoint=0)
    insert(application, 700, size=3000)
    subject = engine_for(database, client)
    subject.open()
    drain(subject)
    assert subject.checkpoint()  # the pages are in the file
    insert(application, 1)
    drain(subject)
    expected, txid = checkpointed_bytes(database, tmp_path), subject.txid
    pages, overwritten = Snapshot.pages, []

    def slowly(self, lock):
        for number, page in enumerate(pages(self, lock)):
            if number == 1:
                application.execute("UPDATE t SET v = zeroblob(3000)")
                overwritten.append(subject.checkpoint())
            yield page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "pages", slowly)
        made = subject.snapshot()
    assert overwritten == [True]
    header, pages_of_it, _ = decode_file(b"".join(made.pieces(1 << 20)))
    assert header.max_txid == txid
    assert b"".join(page for _, page in pages_of_it) == expected
    subject.close()
    application.close()
