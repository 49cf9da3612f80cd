"""Replicas that are ahead, behind, away, emptied, damaged, or somebody else's: one history on all of them, or an error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.compactor import compact
from replicator.engine import NotSynced
from replicator.errors import Diverged, Fenced, LineageMismatch, ReplicaStateError, ReplicatorError, StorageUnavailable, WaitTimeout
from replicator.filling import SourceFailed
from replicator.levels import History
from replicator.outbox import OutFile, Staging
from replicator.storage.memory import MemoryClient
from replicator.uploader import Uploader
from tests.e2e.databases import Flaky, checkpointed_bytes, connect, damage_files, drain, engine_for, insert, restored, rows, until

TIMEOUT_S = 20


def stopped(replicator: Replicator) -> None:
    """Close without waiting for what cannot be stored."""
    with contextlib.suppress(WaitTimeout):
        replicator.close(timeout_s=0.05)


def upload_by_two(database: Path, one: Flaky, two: Flaky, application: sqlite3.Connection) -> None:
    """Store a TXID on both, and the next one on the first only."""
    replicator = Replicator(database, one, two).start()
    insert(application, 100)
    replicator.wait(timeout_s=TIMEOUT_S)
    two.down = True
    application.execute("UPDATE t SET v = 'only on the first' WHERE id = 1")
    replicator.wait(replicas="any", timeout_s=TIMEOUT_S)
    stopped(replicator)
    two.down = False


# -- a replica that was ahead, left out, and is back -----------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [True, False])
def test_a_replica_that_was_ahead_and_left_out_is_joined_exactly(tmp_path: Path, writes: bool) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    upload_by_two(database, one, two, application)
    if writes:
        application.execute("UPDATE t SET v = 'undone' WHERE id = 1")
    with Replicator(database, two) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        if writes:
            application.execute("UPDATE t SET v = 'more' WHERE id = 50")
    assert rows(restored(two, tmp_path)) == rows(application)
    with Replicator(database, one, two) as replicator:
        insert(application, 1)
        replicator.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
        assert restored(one, tmp_path).read_bytes() == expected
        assert restored(two, tmp_path).read_bytes() == expected
    application.close()


@pytest.mark.fault("F45", "F48")
def test_a_txid_that_two_writers_gave_out_is_refused_when_its_replica_is_back(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    upload_by_two(database, one, two, application)
    elsewhere = restored(two, tmp_path, "elsewhere.db")
    other = connect(elsewhere)
    with Replicator(elsewhere, two):  # knows nothing of the TXID that the first replica has
        other.execute("UPDATE t SET v = 'theirs' WHERE id = 2")
    other.close()
    with pytest.raises(Diverged):
        Replicator(elsewhere, one, two).start()
    application.close()


@pytest.mark.fault("F48")
def test_the_table_is_not_trusted_where_another_writer_stored_its_txid(tmp_path: Path) -> None:
    """What was staged in an outage has its TXID; when the store is back, somebody else's file stands there."""
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    insert(application, 100)
    replicator = Replicator(database, client, sync_interval_s=0.01).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    client.down = True
    application.execute("UPDATE t SET v = 'ours' WHERE id = 1")
    until(lambda: list((tmp_path / ".a.db-litestream/pyrepl/staged").glob("0-*.ltx")))
    stopped(replicator)
    client.down = False
    elsewhere = restored(client, tmp_path, "elsewhere.db")
    other = connect(elsewhere)
    with Replicator(elsewhere, client):
        other.execute("UPDATE t SET v = 'theirs' WHERE id = 2")
    other.close()
    try:
        with Replicator(database, client) as replicator:
            replicator.wait(timeout_s=TIMEOUT_S)
    except ReplicaStateError:
        assert len(client.names(0)) == 2  # refusing is right, too
    else:
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_staged_files_are_not_added_to_those_of_another_writer(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    insert(application, 100)
    replicator = Replicator(database, client, sync_interval_s=0.01).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    client.down = True
    for number in (1, 2):
        application.execute("UPDATE t SET v = 'ours' WHERE id = ?", (number * 20,))
        until(lambda: len(list((tmp_path / ".a.db-litestream/pyrepl/staged").glob("0-*.ltx"))) == number)  # noqa: B023
    stopped(replicator)
    client.down = False
    elsewhere = restored(client, tmp_path, "elsewhere.db")
    other = connect(elsewhere)
    with Replicator(elsewhere, client):
        other.execute("UPDATE t SET v = 'theirs' WHERE id = 70")
    other.close()
    try:
        with Replicator(database, client) as replicator:
            replicator.wait(timeout_s=TIMEOUT_S)
    except ReplicaStateError:
        assert len(client.names(0)) == 2
    else:
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F42")
def test_how_far_a_replica_has_come_is_written_down_before_a_staged_file_goes(tmp_path: Path) -> None:
    """The staged file proves that the stored one is ours; after a kill something else must."""

    class Held(Flaky):
        def put(self, level, min_txid, *args, **options):
            if min_txid == 3:
                raise StorageUnavailable("held")
            return super().put(level, min_txid, *args, **options)

    database, client = tmp_path / "a.db", Held()
    folder = tmp_path / ".a.db-litestream/pyrepl"
    application = connect(database)
    replicator = Replicator(database, client, sync_interval_s=0.01, history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    client.down = True
    for count in (1, 2):
        insert(application, 5)
        until(lambda: len(list((folder / "staged").glob("0-*.ltx"))) == count)  # noqa: B023
    client.down = False
    until(lambda: len(list((folder / "staged").glob("0-*.ltx"))) == 1)
    assert json.loads((folder / "replicas.json").read_bytes()) == {client.url: 2}
    stopped(replicator)
    application.close()


def test_a_killed_engine_trusts_its_table_where_the_replica_has_its_own_file(tmp_path: Path) -> None:
    """The file that says how far the replica is may be some seconds older than the table."""
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    child = os.fork()
    if not child:
        with Replicator(database, url) as replicator:
            for _ in range(3):
                insert(application, 50)
                replicator.wait(timeout_s=TIMEOUT_S)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    subject = engine_for(database, *[Replicator(database, url)._clients[0]])
    read: list[object] = []
    subject.replicas[0].plan = lambda: read.append(1) or []  # type: ignore[method-assign, func-returns-value]  the way of a rebuild
    subject.open()
    assert subject.txid == 3
    assert not read
    assert subject._table is not None
    assert subject._table.state.txid == 3
    subject.close()
    application.close()


# -- replicas without a lineage --------------------------------------------------------------------------------------------------


def history_of(folder: Path, name: str, transactions: int) -> MemoryClient:
    """Make a database with its replica, and remove the replica's lineage: so do those of Litestream look."""
    client = MemoryClient()
    client.url = f"memory://{name}"
    application = connect(folder / f"{name}.db")
    with Replicator(folder / f"{name}.db", client, history=None) as replicator:
        for number in range(transactions):
            application.execute("INSERT INTO t(v) VALUES(?)", (f"{name} {number}" * 200,))
            replicator.wait(timeout_s=TIMEOUT_S)
    application.close()
    client._store.control.clear()
    return client


@pytest.mark.parametrize("raw_files", [True, False])
def test_replicas_of_unrelated_histories_are_refused(tmp_path: Path, raw_files: bool) -> None:
    one, two = history_of(tmp_path, "one", 3), history_of(tmp_path, "two", 6)
    if not raw_files:  # as after the retention of raw files
        merge(two, 5)
    with pytest.raises(Diverged):
        Replicator(tmp_path / "one.db", one, two, meta_path=tmp_path / "meta").start()
    restored(one, tmp_path)
    assert len(list(one.list(0))) == 3


@pytest.mark.parametrize("transactions", [2, 9])
@pytest.mark.parametrize("left", [True, False])
def test_a_foreign_replica_beside_our_own_is_refused_or_right(tmp_path: Path, transactions: int, left: bool) -> None:
    database, ours = tmp_path / "a.db", Flaky("ours")
    foreign = history_of(tmp_path, "foreign", transactions)
    merge(foreign, 3, 7)
    application = connect(database)
    with Replicator(database, ours) as replicator:
        for _ in range(5):
            insert(application, 5)
            replicator.wait(timeout_s=TIMEOUT_S)
    clients = [foreign] if left else [ours, foreign]
    try:
        with Replicator(database, *clients) as replicator:
            insert(application, 1)
            replicator.wait(timeout_s=TIMEOUT_S)
    except ReplicatorError as error:
        assert isinstance(error, ReplicaStateError)  # noqa: PT017  either is right
    else:
        for client in clients:
            assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def merge(client: MemoryClient, *ends: int) -> None:
    """Merge the raw files up to each of these TXIDs into one of level 1, and keep none of them but the newest of all."""
    with tempfile.TemporaryDirectory() as folder:
        scratch, newest = Staging(Path(folder), limit_bytes=1 << 30), list(client.list(0))[-1].max_txid
        low = 1
        for high in ends:
            raw = [info for info in client.list(0) if low <= info.min_txid and info.max_txid <= high]
            if raw:
                out = compact(raw, 1, lambda info: [client.open(info).read()], scratch).out
                client.put(1, out.min_txid, out.max_txid, out.body, timestamp_ms=out.timestamp_ms)
                client.delete(info for info in raw if info.max_txid < newest)
            low = high + 1


# -- page sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F71")
def test_a_replica_that_missed_a_change_of_the_page_size_gets_a_full_image(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    insert(application, 100)
    with Replicator(database, one, two, history=None):
        pass
    application.execute("PRAGMA journal_mode=DELETE")
    application.execute("PRAGMA page_size=8192")
    application.execute("VACUUM")
    application.execute("PRAGMA journal_mode=WAL")
    replicator = Replicator(database, one, two, history=None).start()
    two.down = True
    replicator.wait(replicas="any", timeout_s=TIMEOUT_S)
    stopped(replicator)
    two.down = False
    with Replicator(database, one, two, history=None) as replicator:
        insert(application, 1)
        replicator.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
    for client in (one, two):
        assert restored(client, tmp_path).read_bytes() == expected
    application.close()


# -- a replica that does not answer at the start ---------------------------------------------------------------------------------


def test_one_replica_that_is_away_at_the_start_does_not_stop_the_other(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two):
        insert(application, 5)
    two.down = True
    with Replicator(database, one, two) as replicator:
        insert(application, 5)
        assert replicator.wait(replicas="any", timeout_s=TIMEOUT_S) == 2
        assert replicator.status().state == "degraded"
        until(lambda: replicator.status().replicas[1].retries > 0)
        assert replicator.status().replicas[0].retries == 0
        assert restored(one, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        insert(application, 5)
        replicator.wait(replicas=[one.url], timeout_s=TIMEOUT_S)
        two.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        assert two.names(0) == [(1, 1), (2, 2), (3, 3)]
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        until(lambda: replicator.status().state == "replicating")
    application.close()


def test_a_replica_that_comes_late_and_was_emptied_is_refused_and_the_other_goes_on(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two):
        insert(application, 5)
    two.down = True
    replicator = Replicator(database, one, two).start()
    two._store.files.clear()
    two.down = False
    until(lambda: "holds" in (replicator.status().replicas[1].error or "") or "lost" in (replicator.status().replicas[1].error or ""))
    insert(application, 5)
    assert replicator.wait(replicas="any", timeout_s=TIMEOUT_S) == 2
    assert two.names(0) == []
    stopped(replicator)
    application.close()


def test_force_snapshot_with_one_replica_away_does_not_begin_another_history(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two):
        insert(application, 5)
    one._store.files.clear()
    two.down = True
    with Replicator(database, one, two, force_snapshot=True) as replicator:
        insert(application, 5)
        replicator.wait(replicas=[one.url], timeout_s=TIMEOUT_S)
        two.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        for client in (one, two):
            assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_replica_without_a_common_file_gets_a_full_image(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two, history=None):
        insert(application, 5)
    with Replicator(database, one, history=None) as replicator:
        for _ in range(3):
            insert(application, 5)
            replicator.wait(timeout_s=TIMEOUT_S)
    merge(one, 4)
    with Replicator(database, one, two, history=None) as replicator:
        insert(application, 5)
        replicator.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
    for client in (one, two):
        assert restored(client, tmp_path).read_bytes() == expected
    assert two.names(9)
    application.close()


def test_a_replica_with_a_txid_that_a_killed_run_gave_out_is_refused_when_it_comes_late_and_stops_nobody(tmp_path: Path) -> None:
    class Held(Flaky):
        held = False

        def put(self, *args, **options):
            if self.held:
                raise StorageUnavailable("held")
            return super().put(*args, **options)

    database, one, two = tmp_path / "a.db", Held("one"), Flaky("two")
    application = connect(database)
    first = engine_for(database, one, two)
    first.open()
    drain(first)
    insert(application, 5)
    entry = first.advance()
    assert entry is not None
    first.replicas[1].store(entry.files, entry.txid)  # and then it is killed
    first.replicas[1].online = False  # nothing of it is written down
    first.close()
    one.held = two.down = True
    replicator = Replicator(database, one, two, history=None, sync_interval_s=0.01).start()
    until(lambda: replicator.status().txid == 2)
    two.down = False
    until(lambda: "cannot be compared" in (replicator.status().replicas[1].error or ""))
    one.held = False
    until(lambda: "another history" in (replicator.status().replicas[1].error or ""))
    insert(application, 5)
    assert replicator.wait(replicas="any", timeout_s=TIMEOUT_S) == 3
    assert restored(one, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    stopped(replicator)
    application.close()


# -- filling ---------------------------------------------------------------------------------------------------------------------


def test_a_new_replica_is_filled_by_an_image_when_the_others_files_are_damaged(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, history=None) as replicator:
        for _ in range(3):
            insert(application, 50)
            replicator.wait(timeout_s=TIMEOUT_S)
    damage_files(one, level=0)
    with Replicator(database, one, two, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        assert two.names(9) == [(1, 3)]
        insert(application, 5)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_replica_that_fails_in_the_middle_of_filling_goes_on_where_it_was(tmp_path: Path) -> None:
    class Dies(Flaky):
        puts = 0

        def put(self, *args, **options):
            self.puts += 1
            if self.puts in (3, 4):
                raise StorageUnavailable("dies")
            return super().put(*args, **options)

    database, one, two = tmp_path / "a.db", Flaky("one"), Dies("two")
    application = connect(database)
    with Replicator(database, one, history=None) as replicator:
        for _ in range(6):
            insert(application, 5)
            replicator.wait(timeout_s=TIMEOUT_S)
    with Replicator(database, one, two, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        assert two.names(0) == one.names(0)
        assert two.puts == 8
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_an_image_for_a_replica_is_exact_while_writes_go_on(tmp_path: Path) -> None:
    class Slow(Flaky):
        """Takes a full image only when twenty transactions were committed meanwhile."""

        def put(self, level, *args, **options):
            if level == 9:
                assert written.wait(TIMEOUT_S)
            return super().put(level, *args, **options)

    database, one, two = tmp_path / "a.db", Flaky("one"), Slow("two")
    written = threading.Event()
    application = connect(database)
    insert(application, 3000, size=1000)
    with Replicator(database, one, history=None, sync_interval_s=0.01):
        pass
    damage_files(one, level=0)
    with Replicator(database, one, two, history=None, min_checkpoint_pages=20, sync_interval_s=0.01) as replicator:
        for number in range(60):
            application.execute("UPDATE t SET v = randomblob(1000) WHERE id % 30 = ?", (number % 30,))
            replicator.wait(replicas=[one.url], timeout_s=TIMEOUT_S)
            if number == 20:
                written.set()
        replicator.wait(timeout_s=TIMEOUT_S)
        assert two.names(9)
        assert replicator.status().checkpoints > 0
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F29")
@pytest.mark.parametrize("level", [9, 0])
def test_an_image_whose_reply_was_lost_is_stored_again_without_taking_it_for_somebody_elses(tmp_path: Path, level: int) -> None:
    class LosesReply(Flaky):
        lost = 0

        def put(self, at, *args, **options):
            info = super().put(at, *args, **options)
            if at == level and not self.lost:
                self.lost += 1
                raise StorageUnavailable("no reply")
            return info

    database, one, two = tmp_path / "a.db", Flaky("one"), LosesReply("two")
    application = connect(database)
    insert(application, 50)
    with Replicator(database, one, history=None):
        pass
    damage_files(one, level=0)
    with Replicator(database, one, two, history=None) as replicator:
        replicator.wait(timeout_s=TIMEOUT_S)
        assert two.lost
        insert(application, 5)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_foreign_file_at_the_txid_of_an_image_still_stops_us(tmp_path: Path) -> None:
    class Foreign(Flaky):
        def put(self, level, min_txid, max_txid, body, **options):
            if level == 9:  # another writer is faster with the raw file
                data = next(stored.data for stored in one._store.files.values() if stored.info.level == 0)
                super().put(0, max_txid, max_txid, data, timestamp_ms=1)
            return super().put(level, min_txid, max_txid, body, **options)

    database, one, two = tmp_path / "a.db", Flaky("one"), Foreign("two")
    application = connect(database)
    insert(application, 50)
    with Replicator(database, one, history=None):
        pass
    damage_files(one, level=0)
    replicator = Replicator(database, one, two, history=None).start()
    with pytest.raises(Fenced):
        replicator.wait(timeout_s=TIMEOUT_S)
    with pytest.raises(Fenced):
        replicator.close()
    application.close()


def test_a_replica_that_was_filled_with_merged_files_needs_no_image_at_the_next_start(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, history=None) as replicator:
        for _ in range(4):
            insert(application, 5)
            replicator.wait(timeout_s=TIMEOUT_S)
    merge(one, 4)
    for _ in range(2):
        with Replicator(database, one, two, history=None) as replicator:
            replicator.wait(timeout_s=TIMEOUT_S)
        assert two.names(9) == []
        assert two.names(0) == [(4, 4)]
    application.close()


# -- snapshots and other writers -------------------------------------------------------------------------------------------------


def test_a_full_image_is_not_stored_over_the_txid_of_another_writer(tmp_path: Path) -> None:
    class Held(Flaky):
        held = False

        def put(self, level, *args, **options):
            if level == 0 and self.held:
                raise StorageUnavailable("held")
            return super().put(level, *args, **options)

    database, client = tmp_path / "a.db", Held()
    application = connect(database)
    insert(application, 50)
    replicator = Replicator(database, client, sync_interval_s=0.01, history=None).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    elsewhere = restored(client, tmp_path, "elsewhere.db")
    other = connect(elsewhere)
    snapshot = replicator._engine.snapshot

    def meanwhile():
        with Replicator(elsewhere, client, history=None):
            other.execute("UPDATE t SET v = 'theirs' WHERE id = 2")
        client.held = True
        application.execute("UPDATE t SET v = 'ours' WHERE id = 1")
        until(lambda: replicator.status().txid == 2)  # encoded, and not stored
        try:
            return snapshot()
        finally:
            client.held = False

    replicator._engine.snapshot = meanwhile  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        replicator.snapshot(timeout_s=TIMEOUT_S)
    assert client.names(9) == []
    assert rows(restored(client, tmp_path)) == rows(other)
    with pytest.raises(Fenced):
        replicator.close()
    other.close()
    application.close()


@pytest.mark.parametrize("stored", [True, False])
def test_the_keeper_takes_no_image_of_a_txid_that_is_not_stored(tmp_path: Path, stored: bool) -> None:
    class Held(Flaky):
        """Takes the raw file of TXID 2 when it may."""

        def put(self, level, min_txid, max_txid, *args, **options):
            if level == 0 and max_txid == 2 and not go.is_set():
                tried.set()
                raise StorageUnavailable("held")
            return super().put(level, min_txid, max_txid, *args, **options)

    database, client = tmp_path / "a.db", Held()
    go, tried = threading.Event(), threading.Event()
    application = connect(database)
    insert(application, 5)
    history = History(level_intervals_s=(0.05,), snapshot_interval_s=0.05, snapshot_retention_s=100)
    replicator = Replicator(database, client, history=history, sync_interval_s=0.01).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    until(lambda: client.names(9) == [(1, 1)])
    insert(application, 5)
    assert tried.wait(TIMEOUT_S)
    if stored:
        go.set()
        until(lambda: client.names(9)[-1] == (1, 2))
        replicator.close()
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    else:
        stopped(replicator)
        assert client.names(9) == [(1, 1)]
    application.close()


def test_a_replica_of_another_lineage_is_refused(tmp_path: Path) -> None:
    clients = [Flaky("one"), Flaky("two")]
    for name, client in zip("ab", clients, strict=True):
        application = connect(tmp_path / f"{name}.db")
        insert(application, 5)
        with Replicator(tmp_path / f"{name}.db", client):
            pass
        application.close()
    with pytest.raises(LineageMismatch):
        Replicator(tmp_path / "a.db", *clients).start()


@pytest.mark.parametrize("tail", [False, True], ids=["read", "tail"])
def test_a_replica_gets_its_image_while_the_engine_waits_for_that_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bool
) -> None:
    """One was away and its entries are gone; the other one dies, and the staging folder is full: the first comes back.

    `tail`: the folder is full when a checkpoint has found a commit that was not read yet, and that commit is handed out after somebody has
    asked for an image: none can be taken before.
    """
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application, other = connect(database), connect(database)
    wait, waited_for = Uploader._wait, list[Exception]()
    monkeypatch.setattr(Uploader, "_wait", lambda self, error, delay_s: waited_for.append(error) or wait(self, error, delay_s))
    with Replicator(database, one, two, staging_limit_bytes=300_000, history=None) as replicator:
        engine, refused = replicator._engine, list[bool]()
        checkpoint, snapshot = engine.checkpoint, engine.snapshot

        def checkpoint_with_a_tail() -> bool:
            with engine.lock:
                if two.down:
                    other.execute("INSERT INTO t(v) VALUES('tail')")
                    engine._staging.limit_bytes = 0  # full from this moment on
            return checkpoint()

        def snapshot_at_the_second_try() -> OutFile:
            if not (refused or one.down):
                refused.append(True)
                raise NotSynced("not yet")
            return snapshot()

        insert(application, 5)
        replicator.wait(timeout_s=TIMEOUT_S)
        one.down = True
        for _ in range(3):
            insert(application, 5)
            replicator.wait(replicas=[two.url], timeout_s=TIMEOUT_S)
        with replicator._board.changed:
            replicator._board._outbox.clear()  # as when they became many
        replicator._board.retry_s = 0.05
        two.down = True
        if tail:
            monkeypatch.setattr(engine, "checkpoint_due", lambda: two.down)
            monkeypatch.setattr(engine, "checkpoint", checkpoint_with_a_tail)
            monkeypatch.setattr(engine, "snapshot", snapshot_at_the_second_try)
        until(lambda: insert(application, 20, size=3000) or replicator._engine.staging_is_full())
        until(lambda: "staging folder is full" in (replicator.status().error or ""))
        one.down = False
        until(lambda: replicator.status().replicas[0].txid > 4)
        assert not [error for error in waited_for if isinstance(error, SourceFailed)]  # the image is tried at once
        assert len(refused) == tail
        with engine.lock:
            two.down = False
        replicator.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
        assert restored(one, tmp_path).read_bytes() == restored(two, tmp_path).read_bytes() == expected
    application.close()
    other.close()
