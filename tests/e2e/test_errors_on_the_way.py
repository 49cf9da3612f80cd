"""Errors between reading a change and having it stored: nothing is dropped, nothing is acknowledged too early, and nobody dies in silence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.engine import Engine
from replicator.errors import DatabaseStateError, ReplicaEmptied, ReplicatorError, StorageUnavailable, WaitTimeout
from replicator.outbox import DISK_RESERVE_BYTES, Entry
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import Flaky, checkpointed_bytes, connect, drain, engine_for, insert, restored, rows, until

TIMEOUT_S = 20


def fails_once(function, error: Exception):
    """Return the function with a first call that raises."""
    left = [error]

    def call(*args, **options):
        if left:
            raise left.pop()
        return function(*args, **options)

    return call


def go_back(application: sqlite3.Connection, database: Path, backup: Path) -> None:
    """Put an earlier copy in the place of the database, as an operator does while replication is stopped."""
    application.close()
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.copy(backup, database)


# -- an entry is never dropped (finding 8) ---------------------------------------------------------------------------------------


@pytest.mark.fault("F24")
@pytest.mark.parametrize("place", ["salts_are", "stage", "settled"])
def test_an_entry_is_not_dropped_by_an_error_on_the_way(tmp_path: Path, place: str) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    application.execute("CREATE TABLE other(v)")
    insert(application, 5)
    with Replicator(database, client, sync_interval_s=0.01, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        backup = Path(shutil.copy(restored(client, tmp_path), tmp_path / "backup.db"))
        subject = replicator._engine._database if place == "salts_are" else replicator._engine
        setattr(subject, place, fails_once(getattr(subject, place), OSError(errno.EMFILE, "Too many open files")))
        client.down = place == "stage"
        if place == "salts_are":
            application.execute("INSERT INTO t(v) VALUES(zeroblob(?))", (20 << 20,))  # too large to be kept in memory
        else:
            application.execute("UPDATE t SET v = 'after the backup' WHERE id = 1")
        if place == "stage":
            until(lambda: list((tmp_path / ".a.db-litestream/pyrepl/staged").glob("0-*.ltx")))
        client.down = False
        assert replicator.wait(timeout_s=TIMEOUT_S) == 2
        application.execute("INSERT INTO other VALUES(1)")
        assert replicator.wait(timeout_s=TIMEOUT_S) == 3
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    go_back(application, database, backup)  # whatever the page table did not learn is taken for unchanged now
    with Replicator(database, client, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
    assert rows(restored(client, tmp_path)) == rows(backup)


# -- life (9, 18) ----------------------------------------------------------------------------------------------------------------


def test_a_replicator_is_started_once(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    replicator = Replicator(tmp_path / "a.db", MemoryClient()).start()
    replicator.close()
    with pytest.raises(RuntimeError, match="once"):
        replicator.start()
    application.close()


@contextlib.contextmanager
def forked_child() -> Iterator[None]:
    """Fork a child that does nothing but live while the block runs."""
    (lives, says), (waits, ends) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(ends)
        os.write(says, b".")
        os.read(waits, 1)
        os._exit(0)
    try:
        os.read(lives, 1)
        yield
    finally:
        for file in (lives, says, waits, ends):
            os.close(file)
        os.waitpid(child, 0)


@pytest.mark.fault("F5")
def test_a_forked_child_does_not_keep_the_database_locked_when_its_parent_is_killed(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    replicator = Replicator(database, client).start()
    with forked_child():
        os.close(replicator._engine._lock_file)  # as the kernel does
        replicator._engine._lock_file = -1
        with (tmp_path / ".a.db-litestream/pyrepl/lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    replicator.close()
    application.close()


@pytest.mark.fault("F5")
def test_the_lock_is_free_after_close_though_a_forked_child_lives(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    replicator = Replicator(database, client).start()
    with forked_child():
        replicator.close()
        with Replicator(database, client):
            pass
    application.close()


# -- emptied replicas (10) -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F42", "F63")
def test_an_emptied_replica_is_refused_at_each_start_and_not_only_at_the_first(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    insert(application, 5)
    with Replicator(database, client):
        pass
    client._store.files.clear()
    for _ in range(3):
        with pytest.raises(ReplicaEmptied):
            Replicator(database, client).start()
    application.close()


@pytest.mark.fault("F42", "F63")
def test_a_replica_that_is_emptied_after_a_kill_is_refused(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    connect(database).close()
    child = os.fork()
    if not child:
        replicator = Replicator(database, url).start()
        replicator.wait(timeout_s=TIMEOUT_S)
        until(lambda: replicator._engine._table is not None and replicator._engine._table.state.txid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.rmtree(tmp_path / "replica/ltx")
    with pytest.raises(ReplicaEmptied):
        Replicator(database, url).start()


# -- the store is away at the start (13) -----------------------------------------------------------------------------------------


@pytest.mark.fault("F35")
def test_a_start_without_the_store_begins_when_it_is_back_whatever_fails_next(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    insert(application, 5)
    client.down = True
    replicator = Replicator(database, client, sync_interval_s=0.01)
    replicator._engine.advance = fails_once(replicator._engine.advance, DatabaseStateError("busy"))  # type: ignore[method-assign]
    with replicator:
        assert replicator.status().state == "starting"
        client.down = False
        assert replicator.wait(timeout_s=TIMEOUT_S) == 1
        assert replicator.status().state == "replicating"
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


# -- defects (14) ----------------------------------------------------------------------------------------------------------------


def test_a_defect_in_a_client_is_reported_and_not_swallowed(tmp_path: Path) -> None:
    class Bad(MemoryClient):
        def put(self, level, min_txid, *args, **options):
            if min_txid == 2:
                raise ValueError("a bug in a client")
            return super().put(level, min_txid, *args, **options)

    application = connect(tmp_path / "a.db")
    replicator = Replicator(tmp_path / "a.db", Bad(), history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    insert(application, 1)
    with pytest.raises(ReplicatorError, match="a bug in a client"):
        replicator.wait(timeout_s=TIMEOUT_S)
    assert replicator.status().state == "failed"
    with pytest.raises(ReplicatorError, match="a bug in a client"):
        replicator.close()
    application.close()


@pytest.mark.fault("F9")
def test_a_defect_in_the_engine_is_reported_and_not_swallowed(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    replicator = Replicator(tmp_path / "a.db", MemoryClient(), history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    replicator._engine.advance = fails_once(None, AssertionError("a bug"))  # type: ignore[method-assign]
    with pytest.raises(ReplicatorError, match="a bug"):
        replicator.wait(timeout_s=TIMEOUT_S)
    with pytest.raises(ReplicatorError, match="a bug"):
        replicator.close()
    application.close()


# -- under load (15, 16) ---------------------------------------------------------------------------------------------------------


def test_a_wait_ends_and_the_interval_holds_while_somebody_writes_without_end(tmp_path: Path) -> None:
    class Writes(Flaky):
        """Commits whenever a file is stored: when the engine looks again, something is there."""

        armed = False

        def put(self, *args, **options):
            if self.armed:
                application.execute("INSERT INTO t(v) VALUES(1)")
            return super().put(*args, **options)

    database, client = tmp_path / "a.db", Writes()
    application = connect(database)
    with Replicator(database, client, sync_interval_s=30, history=None) as replicator:
        first = replicator.wait(timeout_s=TIMEOUT_S)
        client.armed = True
        application.execute("INSERT INTO t(v) VALUES(0)")
        assert replicator.wait(timeout_s=5) == first + 1
        assert replicator.status().replicas[0].files_sent <= first + 2
        client.armed = False
    application.close()


def test_a_commit_while_the_watch_is_armed_is_not_overslept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from replicator.watch import Watch

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database)
    arm, armed = Watch.arm, threading.Event()

    def arming(self):
        found = arm(self)
        if found and not armed.is_set():
            advance = replicator._engine.advance

            def late():
                entry = advance()
                if self.armed and not armed.is_set():  # the look after arming found nothing; now somebody commits
                    application.execute("INSERT INTO t(v) VALUES('late')")
                    until(lambda: woken)  # and the event is there before the engine's thread goes on
                    armed.set()
                return entry

            replicator._engine.advance = late  # type: ignore[method-assign]
        return found

    woken: list[object] = []
    monkeypatch.setattr(Watch, "arm", arming)
    replicator = Replicator(database, client, sync_interval_s=0.05, history=None)
    watch = replicator._loop._watch if hasattr(replicator, "_loop") else replicator._watch
    wake = watch._wake
    watch._wake = lambda: (wake(), woken.append(1))
    with replicator:
        before = replicator.wait(timeout_s=TIMEOUT_S)
        assert armed.wait(TIMEOUT_S)
        until(lambda: replicator.status().replicas[0].txid == before + 1, timeout_s=5)
    application.close()


# -- staging (20) ----------------------------------------------------------------------------------------------------------------


def staged_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(".a.db-litestream/pyrepl/staged/*"))


@pytest.mark.fault("F23")
def test_the_bound_of_the_staging_folder_holds_for_large_files(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    with Replicator(database, client, sync_interval_s=0.01, staging_limit_bytes=1 << 20, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        client.down = True
        for number in range(4):
            application.execute("INSERT INTO t(v) VALUES(randomblob(?))", (9 << 20,))
            if number == 0:
                until(lambda: staged_bytes(tmp_path) > 9 << 20)  # one that is larger than the bound is needed to go on
        with pytest.raises(WaitTimeout, match="full"):
            replicator.wait(timeout_s=1)
        # One more where the WAL began anew meanwhile: the rest of the old one goes first, or a replica that lacks files could get no image.
        assert staged_bytes(tmp_path) < 20 << 20
        client.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F23")
def test_no_checkpoint_takes_commits_into_a_folder_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that is staged makes a checkpoint due, and each time there is a commit that it would take with it."""
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    settled, left = Engine.settled, [9, 9, 9]

    def and_a_commit(engine: Engine, entry: Entry) -> None:
        settled(engine, entry)
        if entry.txid > 1 and client.down and left:
            connection = sqlite3.connect(database)
            connection.execute("INSERT INTO t(v) VALUES(randomblob(?))", (left.pop() << 20,))
            connection.commit()
            connection.close()

    monkeypatch.setattr(Engine, "settled", and_a_commit)
    with Replicator(
        database, client, sync_interval_s=0.01, staging_limit_bytes=1 << 20, min_checkpoint_pages=10, history=None
    ) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        client.down = True
        application.execute("INSERT INTO t(v) VALUES(randomblob(?))", (9 << 20,))  # larger than what is kept in memory
        until(lambda: len(left) == 2)
        with pytest.raises(WaitTimeout, match="full"):
            replicator.wait(timeout_s=1)
        assert len(left) == 2
        assert staged_bytes(tmp_path) < 10 << 20
        client.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_the_bound_of_the_staging_folder_holds_while_one_of_two_replicas_is_away(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two, sync_interval_s=0.01, staging_limit_bytes=1 << 20, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        two.down = True
        for _ in range(4):
            application.execute("INSERT INTO t(v) VALUES(randomblob(?))", (9 << 20,))
            replicator.wait(replicas=[one.url], timeout_s=TIMEOUT_S)
        until(lambda: staged_bytes(tmp_path) < 12 << 20)
        two.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F23")
def test_the_last_of_the_disk_is_left_to_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    usage = shutil.disk_usage(tmp_path)
    with Replicator(database, client, sync_interval_s=0.01, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=DISK_RESERVE_BYTES - 1))
        client.down = True
        insert(application, 5)
        with pytest.raises(WaitTimeout):
            replicator.wait(timeout_s=1.5)
        assert staged_bytes(tmp_path) == 0
        client.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
    application.close()


class Slow(Flaky):
    """A store that takes a file whenever the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = threading.Semaphore(0)
        self.is_slow = False
        self.bytes_in = 0

    def put(self, level, low, high, body, **options):
        if self.is_slow:
            assert self.turns.acquire(timeout=TIMEOUT_S)
        self.bytes_in += len(body) if isinstance(body, bytes) else body.stat().st_size
        return super().put(level, low, high, body, **options)


@pytest.mark.fault("F41")
def test_a_store_that_is_slower_than_the_application_holds_a_bounded_queue_and_shows_its_lag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.loop.STAGE_AFTER_S", 0.02)
    database, client, limit, file_bytes = tmp_path / "a.db", Slow(), 300_000, 100_000
    application = connect(database)
    with Replicator(database, client, sync_interval_s=0.01, staging_limit_bytes=limit, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        first, client.is_slow = client.bytes_in, True
        for number in range(12):
            application.execute("INSERT INTO t(v) VALUES(randomblob(?))", (file_bytes,))
            until(lambda done=number: replicator.status().txid == done + 2 or "full" in (replicator.status().error or ""))
        status = replicator.status()
        files, memory, staged = status.waiting
        assert 2 < files < 12  # the rest waits in the WAL
        assert memory + staged < limit + 2 * file_bytes
        assert staged_bytes(tmp_path) < limit + 2 * file_bytes
        assert status.wal_size_bytes > limit
        assert status.replicas[0].lag_s > 0
        for _ in range(3):  # slowly it goes on, and what waited in the WAL becomes one file
            stored = len(client.names(0))
            client.turns.release()
            until(lambda before=stored: len(client.names(0)) > before)
        until(lambda: replicator.status().waiting[0] <= 2)
        client.is_slow = False
        client.turns.release()
        replicator.wait(timeout_s=TIMEOUT_S)
        assert replicator.status().replicas[0].lag_s == 0
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        assert client.bytes_in - first < 14 * file_bytes  # each byte was sent once
    application.close()


# -- clocks (22) -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F27")
def test_a_clock_that_was_in_the_future_once_does_not_hide_what_follows(tmp_path: Path) -> None:
    database, client, ahead_s = tmp_path / "a.db", MemoryClient(), [0.0]
    application = connect(database)
    first = engine_for(database, client, clock=lambda: time.time() + ahead_s[0])
    first.open()
    drain(first)
    ahead_s[0] = 10 * 365 * 86400
    insert(application, 1)
    drain(first)
    first.close()
    second = engine_for(database, client)
    second.open()
    insert(application, 1)
    drain(second)
    second.close()
    infos = list(client.list(0))
    assert infos[1].created_at > datetime.now(UTC)
    assert infos[2].created_at <= datetime.now(UTC)
    application.close()


# -- stopping --------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F7")
def test_close_is_prompt_while_the_store_is_away(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    replicator = Replicator(database, client, sync_interval_s=0.01).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    client.down = True
    insert(application, 5)
    until(lambda: replicator.status().replicas[0].error)
    started = time.monotonic()
    with pytest.raises(WaitTimeout, match="out of reach"):
        replicator.close(timeout_s=0.2)
    assert time.monotonic() - started < 2
    client.down = False
    with Replicator(database, client) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_close_is_prompt_when_the_store_was_away_from_the_start(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    client.down = True
    replicator = Replicator(database, client).start()
    started = time.monotonic()
    with pytest.raises(WaitTimeout, match="out of reach"):
        replicator.close(timeout_s=0.2)
    assert time.monotonic() - started < 2
    application.close()


def test_close_does_not_wait_for_a_request_that_hangs(tmp_path: Path) -> None:
    class Hangs(MemoryClient):
        def put(self, level, min_txid, *args, **options):
            if min_txid == 2:
                hanging.set()
                goes_on.wait(TIMEOUT_S)
            return super().put(level, min_txid, *args, **options)

    database, hanging, goes_on = tmp_path / "a.db", threading.Event(), threading.Event()
    application = connect(database)
    replicator = Replicator(database, Hangs(), history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    insert(application, 5)
    assert hanging.wait(TIMEOUT_S)
    started = time.monotonic()
    with pytest.raises(WaitTimeout):
        replicator.close(timeout_s=0.2)
    assert time.monotonic() - started < 3
    goes_on.set()
    application.close()


def test_close_does_not_wait_for_a_full_image_that_nobody_needs_any_more(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    insert(application, 5000, size=3000)
    replicator = Replicator(database, one, history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    pages, reading = replicator._engine._database.pages, threading.Event()

    def slowly(*args):
        reading.set()
        time.sleep(0.5)
        return pages(*args)

    replicator._engine._database.pages = slowly  # type: ignore[method-assign]
    failed: list[BaseException] = []

    def image() -> None:
        try:
            with replicator._images.take(replicator.status().txid):
                pass
        except ReplicatorError as error:
            failed.append(error)

    thread = threading.Thread(target=image)
    replicator._threads.append(thread)  # as a keeper's would be
    thread.start()
    assert reading.wait(TIMEOUT_S)
    started = time.monotonic()
    replicator.close(timeout_s=TIMEOUT_S)
    assert time.monotonic() - started < 3
    assert failed
    two.close()
    application.close()


def test_a_store_that_is_unavailable_for_a_control_object_is_tried_again(tmp_path: Path) -> None:
    class NoControl(Flaky):
        failures = 2

        def put_control(self, name, data, **options):
            if self.failures:
                self.failures -= 1
                raise StorageUnavailable("not now")
            return super().put_control(name, data, **options)

    database, client = tmp_path / "a.db", NoControl()
    application = connect(database)
    insert(application, 5)
    with Replicator(database, client) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
    assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()
