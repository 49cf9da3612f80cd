"""The main job through the library: replicate while an application writes, restore, compare byte for byte."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.errors import (
    AccessDenied,
    ConfigError,
    DatabaseNotFound,
    DatabaseStateError,
    EngineRunning,
    Fenced,
    ReplicaBroken,
    ReplicaEmptied,
    StorageUnavailable,
    WaitTimeout,
)
from replicator.format.ltx import TXID, decode_file
from replicator.replica import read_lineage
from replicator.restorer import restore_database
from replicator.storage import open_client
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids
from tests.e2e.stores import on_each_store

TIMEOUT_S = 60


@pytest.mark.fault("F16")
@on_each_store
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_restore_is_byte_equal_through_checkpoints_vacuum_and_growth(tmp_path: Path, url: str, page_size: int) -> None:
    database = tmp_path / "a.db"
    application = connect(database, page_size=page_size)
    with Replicator(database, url, min_checkpoint_pages=20) as engine:
        for step in range(30):
            insert(application, 20)
            if step % 10 == 7:
                application.execute("DELETE FROM t WHERE id % 3 = 0")
                application.execute("VACUUM")
            if step % 3 == 0:
                engine.wait(timeout_s=TIMEOUT_S)
            if step == 27:  # before growth hides what VACUUM has left
                assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        engine.wait(timeout_s=TIMEOUT_S)
        assert engine.status().checkpoints > 0
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F16")
@on_each_store
def test_auto_vacuum_shrinks_the_restored_file_too(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database, page_size=1024, auto_vacuum="FULL")
    with Replicator(database, url) as engine:
        insert(application, 300)
        engine.wait(timeout_s=TIMEOUT_S)
        large = restored(url, tmp_path).stat().st_size
        application.execute("DELETE FROM t WHERE id > 10")
        engine.wait(timeout_s=TIMEOUT_S)
        output = restored(url, tmp_path)
        assert output.stat().st_size < large
        assert output.read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@on_each_store
def test_every_txid_is_a_committed_state(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    counts = {}
    with Replicator(database, url, sync_interval_s=100) as engine:
        for _ in range(12):
            insert(application, 3)
            txid = engine.wait(timeout_s=TIMEOUT_S)
            counts[txid] = application.execute("SELECT count(*) FROM t").fetchone()[0]
    assert len(counts) == 12
    for txid, count in counts.items():
        connection = sqlite3.connect(restored(url, tmp_path, txid=txid))
        assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == count
        connection.close()
    application.close()


@pytest.mark.fault("F8")
def test_nothing_is_added_to_the_schema(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    before = application.execute("SELECT * FROM sqlite_master").fetchall()
    with Replicator(database, url, min_checkpoint_pages=5) as engine:
        for _ in range(10):
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
    assert application.execute("SELECT * FROM sqlite_master").fetchall() == before
    connection = sqlite3.connect(restored(url, tmp_path))
    assert connection.execute("SELECT * FROM sqlite_master").fetchall() == before
    connection.close()
    application.close()


@pytest.mark.fault("F43")
def test_an_idle_database_makes_no_file_and_no_request(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    client = MemoryClient()
    with Replicator(database, client, checkpoint_interval_s=0.01) as engine:
        insert(application, 3)
        engine.wait(timeout_s=TIMEOUT_S)
        stored = list(client.list(0))
        for _ in range(20):
            assert engine.wait(timeout_s=TIMEOUT_S) == stored[-1].max_txid
        assert list(client.list(0)) == stored
    application.close()


@on_each_store
def test_a_restart_without_changes_uploads_nothing(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 50)
    with Replicator(database, url):
        pass
    before = txids(url)
    for _ in range(3):
        with Replicator(database, url):
            pass
    application.close()
    with Replicator(database, url):
        pass
    assert txids(url) == before


def test_several_replicas_hold_the_same_and_a_late_one_is_filled(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    first, second = f"file://{tmp_path}/one", f"file://{tmp_path}/two"
    application = connect(database)
    with Replicator(database, first) as engine:
        for _ in range(5):
            insert(application, 5)
            engine.wait(timeout_s=TIMEOUT_S)
    with Replicator(database, first, second) as engine:
        insert(application, 5)
        engine.wait(timeout_s=TIMEOUT_S)
    expected = checkpointed_bytes(database, tmp_path)
    assert restored(first, tmp_path).read_bytes() == expected
    assert restored(second, tmp_path).read_bytes() == expected
    application.close()


def test_wait_times_out_while_the_store_is_away_and_the_data_arrives_later(tmp_path: Path) -> None:
    class Away(MemoryClient):
        away = False

        def put(self, *args, **options):
            if self.away:
                raise StorageUnavailable("away")
            return super().put(*args, **options)

    database, client = tmp_path / "a.db", Away()
    application = connect(database)
    with Replicator(database, client, min_checkpoint_pages=10) as engine:
        insert(application, 5)
        engine.wait(timeout_s=TIMEOUT_S)
        client.away = True
        for _ in range(5):
            insert(application, 50)
        with pytest.raises(WaitTimeout, match="away"):
            engine.wait(timeout_s=0.3)
        assert engine.status().state == "degraded"
        client.away = False
        engine.wait(timeout_s=TIMEOUT_S)
        assert engine.status().replicas[0].error is None
        restore_database(client, tmp_path / "r.db", integrity_check="full")
        assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F6")
def test_a_second_engine_is_refused(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url), pytest.raises(EngineRunning, match=r"a\.db"):
        Replicator(database, url).start()
    application.close()


@pytest.mark.fault("F44")
@on_each_store
def test_another_writer_on_the_replica_stops_us(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    engine = Replicator(database, url).start()
    insert(application, 5)
    txid = engine.wait(timeout_s=TIMEOUT_S)
    client = open_client(url)
    [*_, newest] = client.list(0)
    with client.open(newest) as stream:
        data = stream.read()
    client.put(0, TXID(txid + 1), TXID(txid + 1), data, timestamp_ms=1)
    insert(application, 5)
    with pytest.raises(Fenced):
        engine.wait(timeout_s=TIMEOUT_S)
    assert engine.status().state == "failed"
    with pytest.raises(Fenced):
        engine.close()
    application.close()


def test_an_emptied_replica_stops_us_and_force_snapshot_begins_anew(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url):
        insert(application, 5)
    for path in (tmp_path / "replica/ltx/0").iterdir():
        path.unlink()
    with pytest.raises(ReplicaEmptied):
        Replicator(database, url).start()
    with Replicator(database, url, force_snapshot=True):
        pass
    assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@on_each_store
def test_a_full_image_is_exact_while_commits_and_checkpoints_go_on(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 3000, size=3000)
    with Replicator(database, url, min_checkpoint_pages=50) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        taken: list[int] = []
        thread = threading.Thread(target=lambda: taken.append(engine.snapshot()))
        thread.start()
        for number in range(200):
            application.execute("UPDATE t SET v = randomblob(3000) WHERE id IN (?, ?, ?)", (number * 13 % 3000, 3000 - number, number))
            if number % 40 == 20:
                application.execute("DELETE FROM t WHERE id > ?", (3000 - number,))
            if number % 2:
                engine.wait(timeout_s=TIMEOUT_S)
        thread.join()
        engine.wait(timeout_s=TIMEOUT_S)
        assert engine.status().checkpoints > 2
        [txid] = taken
        assert txids(url, level=9) == [txid]
        by_snapshot = restored(url, tmp_path, txid=txid).read_bytes()
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    client = open_client(url)
    client.delete(client.list(9))
    assert restored(url, tmp_path, txid=txid).read_bytes() == by_snapshot
    application.close()


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replica URL"):
        Replicator(tmp_path / "a.db")
    engine = Replicator(tmp_path / "a.db", f"file://{tmp_path}/replica")
    with pytest.raises(DatabaseStateError, match="not running"):
        engine.wait()


@on_each_store
def test_files_carry_what_the_next_writer_needs(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    with Replicator(database, url):
        insert(application, 5)
    salts = (database.with_name("a.db-wal")).read_bytes()[16:24]
    client = open_client(url)
    [*_, newest] = client.list(0)
    with client.open(newest) as stream:
        header, _, _ = decode_file(stream.read())
    assert (header.wal_offset, header.wal_size) == (32, 0)
    assert header.wal_salt1.to_bytes(4, "big") + header.wal_salt2.to_bytes(4, "big") == salts
    assert header.node_id != 0
    application.close()


@pytest.mark.fault("F17")
def test_a_deleted_database_is_reported_and_a_new_one_continues_the_chain(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url, sync_interval_s=0.01) as engine:
        insert(application, 50)
        before = engine.wait(timeout_s=TIMEOUT_S)
        application.close()
        for suffix in ("", "-wal", "-shm"):
            (tmp_path / f"a.db{suffix}").unlink(missing_ok=True)
        with pytest.raises(DatabaseNotFound, match=r"a\.db"):
            engine.wait(timeout_s=TIMEOUT_S)
        assert engine.status().state == "degraded"
        assert txids(url)[-1] == before
        application = connect(database)
        insert(application, 7)
        while engine.status().error:
            try:
                engine.wait(timeout_s=TIMEOUT_S)
            except DatabaseNotFound:
                continue
        assert engine.wait(timeout_s=TIMEOUT_S) == before + 1
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F42")
def test_what_was_staged_in_an_outage_is_stored_by_the_next_start(tmp_path: Path) -> None:
    class Away(MemoryClient):
        away = False

        def put(self, *args, **options):
            if self.away:
                raise StorageUnavailable("away")
            return super().put(*args, **options)

    database, client = tmp_path / "a.db", Away()
    staged = tmp_path / ".a.db-litestream/pyrepl/staged"
    application = connect(database)
    engine = Replicator(database, client, sync_interval_s=0.01).start()
    insert(application, 5)
    engine.wait(timeout_s=TIMEOUT_S)
    client.away = True
    for count in (1, 2):
        insert(application, 5)
        end = time.monotonic() + 20
        while len(list(staged.glob("0-*.ltx"))) < count and time.monotonic() < end:
            time.sleep(0.01)
    assert engine.status().txid == 3
    assert engine.status().replicas[0].txid == 1
    assert engine.status().replicas[0].lag_s > 0
    with pytest.raises(WaitTimeout, match="away"):
        engine.close(timeout_s=0.1)
    assert len(list(staged.iterdir())) == 2
    client.away = False
    with Replicator(database, client) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == 3
    assert [info.max_txid for info in client.list(0)] == [1, 2, 3]
    assert list(staged.iterdir()) == []
    for txid, count in ((1, 5), (2, 10), (3, 15)):
        restore_database(client, tmp_path / "r.db", txid=TXID(txid), force=True, integrity_check="full")
        connection = sqlite3.connect(tmp_path / "r.db")
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (count,)
        connection.close()
    application.close()


def test_a_gap_stops_us_and_force_snapshot_heals_it(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url, history=None) as engine:
        for _ in range(6):
            insert(application, 5)
            engine.wait(timeout_s=TIMEOUT_S)
    (tmp_path / f"replica/ltx/0/{3:016x}-{3:016x}.ltx").unlink()
    with pytest.raises(ReplicaBroken, match="0000000000000002, and go on at 0000000000000004"):
        Replicator(database, url).start()
    insert(application, 5)
    with Replicator(database, url, force_snapshot=True, history=None) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == 7
        insert(application, 5)
        assert engine.wait(timeout_s=TIMEOUT_S) == 8
    assert txids(url) == [1, 2, 4, 5, 6, 7, 8]
    assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    with Replicator(database, url) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == 8
    application.close()


@pytest.mark.fault("F39")
def test_a_key_that_may_only_write_is_enough_after_the_first_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WriteOnly(MemoryClient):
        denied = False

        def list(self, level, **options):
            if self.denied:
                raise AccessDenied("bucket")
            return super().list(level, **options)

        def open(self, info, **options):
            if self.denied:
                raise AccessDenied("bucket")
            return super().open(info, **options)

        def get_control(self, name):
            if self.denied:
                raise AccessDenied("bucket")
            return super().get_control(name)

    database, client = tmp_path / "a.db", WriteOnly()
    application = connect(database)
    client.denied = True
    with pytest.raises(AccessDenied):
        Replicator(database, client).start()
    client.denied = False
    with Replicator(database, client) as engine:
        insert(application, 5)
        engine.wait(timeout_s=TIMEOUT_S)
    client.denied = True
    for _ in range(3):
        with Replicator(database, client) as engine:
            insert(application, 5)
            engine.wait(timeout_s=TIMEOUT_S)
    assert "cannot be listed" in caplog.text
    client.denied = False
    assert [info.max_txid for info in client.list(0)] == [1, 2, 3, 4]
    restore_database(client, tmp_path / "r.db")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_database_at_rest_wakes_nobody_and_a_commit_wakes_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url, sync_interval_s=0.01) as engine:
        insert(application, 5)
        before = engine.wait(timeout_s=TIMEOUT_S)
        looks: list[float] = []
        advance = engine._engine.advance
        monkeypatch.setattr(engine._engine, "advance", lambda: looks.append(time.monotonic()) or advance())
        end = time.monotonic() + TIMEOUT_S
        while not engine._loop._watch.armed and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)  # the look after arming
        looks.clear()
        time.sleep(1)
        assert looks == []
        insert(application, 5)
        engine.wait(before + 1, timeout_s=5)  # nobody asks for a look: the file event does it
        assert looks
    application.close()


def test_a_history_that_begins_anew_gets_a_new_lineage(tmp_path: Path) -> None:
    """Whoever follows the old one must not take the new TXIDs for its continuation."""
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url):
        insert(application, 5)
    before = read_lineage(open_client(url))
    shutil.rmtree(tmp_path / "replica/ltx")
    shutil.rmtree(tmp_path / ".a.db-litestream")
    with Replicator(database, url) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == 1
    after = read_lineage(open_client(url))
    assert before is not None
    assert after is not None
    assert after != before
    with Replicator(database, url) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == 1
    assert read_lineage(open_client(url)) == after
    application.close()
