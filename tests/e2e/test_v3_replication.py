"""Writing format 0.3 when things go wrong: outages, second writers, replicas that lack files, WALs that are restarted at the wrong moment."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyrage
import pytest

from replicator import Replicator, v3engine
from replicator.errors import ConfigError, Fenced, LineageMismatch, StorageUnavailable, WaitTimeout
from replicator.format.v3 import FrameDecoder, SegmentInfo, SnapshotInfo
from replicator.storage import open_client
from tests.compat.litestream03 import restore03
from tests.compat.v3history import History, client, generations, stored
from tests.e2e.databases import checkpointed_bytes, connect, drain, insert, rows, until
from tests.e2e.stores import on_each_store
from tests.e2e.v3databases import Away, exported, v3_engine_for

TIMEOUT_S = 30


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


@pytest.fixture
def store(tmp_path: Path) -> Away:
    return Away(tmp_path / "replica")


def writer(database: Path, *replicas, **options) -> Replicator:
    return Replicator(database, *replicas, format="v0.3", **options)


def stopped(replicator: Replicator) -> None:
    """Close without waiting for what cannot be stored."""
    with contextlib.suppress(WaitTimeout):
        replicator.close(timeout_s=0.05)


def is_exact(database: Path, url: str, folder: Path) -> bool:
    return restore03(url, folder / "theirs.db") == checkpointed_bytes(database, folder)


# -- stores ----------------------------------------------------------------------------------------------------------------------


@on_each_store
def test_each_store_takes_it_and_a_restart_goes_on(tmp_path: Path, database: Path, url: str) -> None:
    application = connect(database)
    for _ in range(2):
        with writer(database, url, sync_interval_s=0.01, min_checkpoint_pages=15) as engine:
            for _ in range(6):
                insert(application, 20)
                engine.wait(timeout_s=TIMEOUT_S)
            engine.snapshot()
    assert is_exact(database, exported(open_client(url), tmp_path / "export"), tmp_path)
    assert len(generations(url)) == 1
    application.close()


def test_what_is_encrypted_comes_back_and_is_continued(tmp_path: Path, database: Path) -> None:
    key = pyrage.x25519.Identity.generate()
    keys = {"age_recipients": [str(key.to_public())], "age_identities": [str(key)]}
    application = connect(database)
    for _ in range(2):
        encrypted = open_client(f"file://{tmp_path}/replica", **keys)
        with writer(database, encrypted) as engine:
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
            insert(application, 20)
    found = [path for path in (tmp_path / "replica" / "generations").rglob("*") if path.is_file()]
    assert len(found) > 3
    assert all(path.read_bytes().startswith(b"age-encryption.org/") for path in found)
    assert is_exact(database, exported(open_client(f"file://{tmp_path}/replica", **keys), tmp_path / "export"), tmp_path)
    assert len(generations(f"file://{tmp_path}/replica")) == 1
    application.close()


def test_a_key_that_cannot_read_begins_a_generation_at_each_start(tmp_path: Path, database: Path) -> None:
    key = pyrage.x25519.Identity.generate()
    application = connect(database)
    for _ in range(2):
        with writer(database, open_client(f"file://{tmp_path}/replica", age_recipients=[str(key.to_public())])) as engine:
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
    assert len(generations(f"file://{tmp_path}/replica")) == 2
    readable = open_client(f"file://{tmp_path}/replica", age_identities=[str(key)])
    assert is_exact(database, exported(readable, tmp_path / "export"), tmp_path)
    application.close()


def test_a_transaction_that_is_too_large_for_memory_is_one_segment(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    with writer(database, store, min_checkpoint_pages=100) as engine:
        insert(application, 1)
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 40, size=1 << 20)
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 1)
        engine.wait(timeout_s=TIMEOUT_S)
        until(lambda: engine.status().checkpoints)
        insert(application, 1)
    assert is_exact(database, store.url, tmp_path)
    assert not [path for path in (tmp_path / ".a.db-litestream").rglob("*.v3*") if path.is_file()]
    application.close()


def test_an_empty_file_becomes_a_database_and_a_generation(tmp_path: Path, database: Path, store: Away) -> None:
    database.touch()
    with writer(database, store) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        with closing(connect(database)) as application:
            insert(application, 10)
            engine.wait(timeout_s=TIMEOUT_S)
    assert is_exact(database, store.url, tmp_path)
    assert len(generations(store.url)) == 1


# -- outages ---------------------------------------------------------------------------------------------------------------------


def test_an_outage_is_staged_and_stored_afterwards_segment_by_segment(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    with writer(database, store, min_checkpoint_pages=10) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        before = engine.status()
        store.down = True
        for _ in range(3):
            txid = engine.status().txid
            insert(application, 20)
            until(lambda txid=txid: engine.status().txid > txid)
        until(lambda: engine.status().checkpoints > before.checkpoints)
        assert engine.status().replicas[0].position == before.position
        assert engine.status().state == "degraded"
        store.down = False
        engine.wait(timeout_s=TIMEOUT_S)
    assert is_exact(database, store.url, tmp_path)
    assert len(generations(store.url)) == 1
    assert list((tmp_path / ".a.db-litestream/pyrepl/staged-v3").iterdir()) == []
    application.close()


def test_what_was_staged_before_a_restart_is_stored_after_it(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    engine = writer(database, store).start()
    insert(application, 20)
    engine.wait(timeout_s=TIMEOUT_S)
    store.down = True
    states = []
    for _ in range(2):
        insert(application, 20)
        until(lambda: len(list((tmp_path / ".a.db-litestream/pyrepl/staged-v3").glob("*.v3"))) == len(states) + 1)
        states.append(checkpointed_bytes(database, tmp_path))
    stopped(engine)
    store.down = False
    with writer(database, store) as engine:
        insert(application, 1)
        engine.wait(timeout_s=TIMEOUT_S)
    assert is_exact(database, store.url, tmp_path)
    assert len(generations(store.url)) == 1
    assert len([info for info in stored(store.url) if isinstance(info, SegmentInfo)]) == 4
    application.close()


def test_staged_files_that_are_damaged_or_elsewhere_are_left_out(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    engine = writer(database, store).start()
    insert(application, 20)
    engine.wait(timeout_s=TIMEOUT_S)
    store.down = True
    insert(application, 20)
    staged = tmp_path / ".a.db-litestream/pyrepl/staged-v3"
    until(lambda: list(staged.glob("*.v3")))
    stopped(engine)
    store.down = False
    (left,) = staged.glob("*.v3")
    data = bytearray(left.read_bytes())
    data[len(data) // 2] ^= 1
    left.write_bytes(data)
    with writer(database, store) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    assert is_exact(database, store.url, tmp_path)
    assert list(staged.iterdir()) == []
    assert len(generations(store.url)) == 1  # the WAL still had it
    application.close()


# -- second writers --------------------------------------------------------------------------------------------------------------


def copy_of(database: Path, folder: Path) -> Path:
    """Return a copy of a database with all that belongs to it, as on a machine that was cloned."""
    folder.mkdir()
    for path in database.parent.glob("*a.db*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "a.db-shm").unlink(missing_ok=True)
    return folder / "a.db"


def test_a_second_writer_stops_the_first_before_it_acknowledges_anything(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    first = writer(database, store).start()
    insert(application, 20)
    first.wait(timeout_s=TIMEOUT_S)
    cloned = copy_of(database, tmp_path / "clone")
    with writer(cloned, store) as second, closing(connect(cloned)) as other:
        insert(application, 1)
        with pytest.raises(Fenced):
            first.wait(timeout_s=TIMEOUT_S)
        insert(other, 5)
        second.wait(timeout_s=TIMEOUT_S)  # what the first has left in the way costs a generation, no more
    with pytest.raises(Fenced):
        first.close()
    assert is_exact(cloned, store.url, tmp_path)
    application.close()


def test_other_bytes_under_the_next_name_cost_a_generation_and_a_lost_path_stops(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    insert(application, 20)
    engine = v3_engine_for(database, store)
    engine.open()
    drain(engine)
    insert(application, 20)
    entry = engine.advance()
    assert entry is not None
    name = SegmentInfo(entry.files[0].generation, 0, entry.files[0].offset, 0, 0).name
    store.put_object(name, entry.files[0].body)  # the same bytes: a try of ours without a reply
    engine.replicas[0].store(entry.files, entry.txid)
    store.put_object(name, b"theirs")
    with pytest.raises(StorageUnavailable, match="holds other bytes"):
        engine.replicas[0].store(entry.files, entry.txid)
    engine.begin_generation("asked for")
    drain(engine)
    assert is_exact(database, store.url, tmp_path)
    store.put_control("pyrepl/v3.json", b"{}")
    insert(application, 1)
    with pytest.raises(Fenced):
        drain(engine)
    engine.close()
    application.close()


def test_the_path_of_another_database_is_refused(tmp_path: Path, database: Path, store: Away) -> None:
    connect(database).close()
    other = tmp_path / "b.db"
    connect(other).close()
    with writer(database, store):
        pass
    with writer(other, f"file://{tmp_path}/other"):
        pass
    with pytest.raises(LineageMismatch):
        writer(other, store).start()


# -- several replicas ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Away, Away]:
    return Away(tmp_path / "one"), Away(tmp_path / "two")


def both_are_exact(database: Path, two: tuple[Away, Away], folder: Path) -> bool:
    return all(is_exact(database, store.url, folder) for store in two)


def test_a_replica_that_was_away_gets_what_it_lacks(tmp_path: Path, database: Path, two: tuple[Away, Away]) -> None:
    application = connect(database)
    with writer(database, *two, min_checkpoint_pages=10) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        two[1].down = True
        for _ in range(5):
            insert(application, 20)
            engine.wait(replicas="any", timeout_s=TIMEOUT_S)
        two[1].down = False
        engine.wait(timeout_s=TIMEOUT_S)
    assert both_are_exact(database, two, tmp_path)
    assert generations(two[0].url) == generations(two[1].url)
    application.close()


def leave_behind(engine: Replicator, application: sqlite3.Connection, two: tuple[Away, Away]) -> None:
    """Let the first replica be away, and what it lacks be gone but for the other one."""
    insert(application, 5)
    engine.wait(timeout_s=TIMEOUT_S)
    two[0].down = True
    insert(application, 5)
    engine.wait(replicas="any", timeout_s=TIMEOUT_S)
    with engine._board.changed:
        engine._board._outbox.clear()  # as when they became many
    engine._board.retry_s = 0.05


def test_a_generation_begins_while_the_engine_waits_for_the_replica_that_needs_it(
    tmp_path: Path, database: Path, two: tuple[Away, Away]
) -> None:
    """One was away and its entries are gone; the other one dies, and the staging folder is full: the first comes back."""
    application = connect(database)
    with writer(database, *two, staging_limit_bytes=100_000) as engine:
        leave_behind(engine, application, two)
        two[1].down = True
        until(lambda: insert(application, 20, size=3000) or engine._engine.staging_is_full())
        until(lambda: "staging folder is full" in (engine.status().error or ""))
        assert len(generations(two[0].url)) == 1
        two[0].down = False
        until(lambda: len(generations(two[0].url)) == 2)
        two[1].down = False
        engine.wait(timeout_s=TIMEOUT_S)
    assert both_are_exact(database, two, tmp_path)
    application.close()


def test_a_replica_takes_the_generation_that_it_asked_for_where_nothing_can_be_staged(
    tmp_path: Path, database: Path, two: tuple[Away, Away], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits until somebody has the generation's first entry, and the only one that could have it waits for the engine's answer."""
    application = connect(database)
    with writer(database, *two) as engine:
        leave_behind(engine, application, two)
        with monkeypatch.context() as patch:
            patch.setattr(engine._engine, "stage", lambda entry: None)  # the folder is full
            two[1].down, two[0].down = True, False
            until(lambda: len(generations(two[0].url)) == 2)
        two[1].down = False
        engine.wait(timeout_s=TIMEOUT_S)
    assert both_are_exact(database, two, tmp_path)
    application.close()


@pytest.mark.parametrize("away_at_start", [False, True])
def test_a_new_replica_is_filled_from_the_other(tmp_path: Path, database: Path, two: tuple[Away, Away], away_at_start: bool) -> None:
    application = connect(database)
    with writer(database, two[0], min_checkpoint_pages=10) as engine:
        for _ in range(5):
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
        insert(application, 20)
    two[1].down = away_at_start
    with writer(database, *two) as engine:
        insert(application, 5)
        engine.wait(replicas="any", timeout_s=TIMEOUT_S)
        two[1].down = False
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 5)
    assert both_are_exact(database, two, tmp_path)
    assert generations(two[0].url) == generations(two[1].url)
    assert len(generations(two[1].url)) == 1
    application.close()


def test_where_two_replicas_were_cut_differently_a_generation_begins(tmp_path: Path, database: Path, two: tuple[Away, Away]) -> None:
    application = connect(database)
    engine = writer(database, *two).start()
    insert(application, 20)
    engine.wait(timeout_s=TIMEOUT_S)
    two[1].down = True
    insert(application, 5)
    engine.wait(replicas="any", timeout_s=TIMEOUT_S)
    stopped(engine)
    two[1].down = False
    insert(application, 5)
    with writer(database, two[1]) as engine:  # goes on earlier, in the same WAL: one segment where the first has two
        engine.wait(timeout_s=TIMEOUT_S)
    with writer(database, *two) as engine:
        insert(application, 5)
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 5)
    assert both_are_exact(database, two, tmp_path)
    application.close()


def test_a_replica_that_is_emptied_gets_a_new_generation(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    with writer(database, store) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        shutil.rmtree(store.root)
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 20)
    assert is_exact(database, store.url, tmp_path)
    application.close()


def test_force_snapshot_begins_a_generation(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    for force in (False, True):
        with writer(database, store, force_snapshot=force) as engine:
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
    assert len(generations(store.url)) == 2
    assert is_exact(database, store.url, tmp_path)
    application.close()


# -- the WAL ---------------------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_read_is_stored_after_the_wal_was_restarted_again(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    insert(application, 20)
    engine = v3_engine_for(database, store)
    engine.open()
    drain(engine)
    assert engine.checkpoint()
    insert(application, 7)  # restarts the WAL; nobody has read it
    assert engine.checkpoint()
    insert(application, 9)  # and again
    assert engine.has_tail
    drain(engine)
    assert engine.place.partition("/")[2].startswith("00000002:")
    assert is_exact(database, store.url, tmp_path)
    first = [info for info in stored(store.url) if isinstance(info, SegmentInfo) and info.offset == 0]
    assert [info.index for info in first] == [0, 1, 2]
    engine.close()
    application.close()


def test_a_checkpoint_that_cannot_restart_the_wal_keeps_the_index(tmp_path: Path, database: Path, store: Away) -> None:
    application, reader = connect(database), connect(database)
    insert(application, 20)
    engine = v3_engine_for(database, store)
    engine.open()
    drain(engine)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM t").fetchone()
    engine.checkpoint()
    insert(application, 20)
    drain(engine)
    assert engine.place.partition("/")[2].startswith("00000000:")
    reader.execute("COMMIT")
    assert is_exact(database, store.url, tmp_path)
    engine.close()
    for connection in (application, reader):
        connection.close()


def test_a_wal_that_has_no_names_left_is_copied_and_a_generation_begins(
    tmp_path: Path, database: Path, store: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v3engine, "MAX_OFFSET", 100_000)
    history = History(database, store.url, tmp_path)
    application = connect(database)
    with writer(database, store, min_checkpoint_pages=10**6, checkpoint_interval_s=0) as engine:
        for _ in range(12):
            insert(application, 50)
            history.note(engine)
    assert 1 < len(generations(store.url)) < 12
    assert max(info.offset for info in stored(store.url) if isinstance(info, SegmentInfo)) <= 100_000
    history.check()
    application.close()


def test_the_last_index_ends_a_generation(tmp_path: Path, database: Path, store: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v3engine, "MAX_INDEX", 2)
    application = connect(database)
    insert(application, 20)
    engine = v3_engine_for(database, store)
    engine.open()
    for _ in range(5):
        insert(application, 5)
        drain(engine)
        assert engine.checkpoint()
    engine.close()
    assert len(generations(store.url)) > 1
    assert max(info.index for info in stored(store.url)) == 2
    assert is_exact(database, store.url, tmp_path)
    application.close()


def test_the_snapshot_has_the_lock_page(tmp_path: Path, database: Path, store: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page at 1 GiB is nobody's. Here it stands at the third page, so that the database need not be as large."""
    monkeypatch.setattr("replicator.snapshot.lock_pgno", lambda size: 3)
    application = connect(database)
    insert(application, 60)
    engine = v3_engine_for(database, store)
    engine.open()
    drain(engine)
    out = engine.snapshot()
    content = b"".join(FrameDecoder().feed(out.body))
    expected = checkpointed_bytes(database, tmp_path)
    assert content == expected[: 2 * 4096] + bytes(4096) + expected[3 * 4096 :]
    engine.close()
    application.close()


def test_a_snapshot_of_an_index_that_has_one_is_as_good(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    with writer(database, store) as engine:
        insert(application, 20)
        engine.snapshot()
        insert(application, 20)
        engine.snapshot()
    assert len([info for info in stored(store.url) if isinstance(info, SnapshotInfo)]) == 1
    assert is_exact(database, store.url, tmp_path)
    application.close()


def test_a_database_that_is_replaced_while_it_is_replicated_begins_a_generation(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    with writer(database, store) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        application.close()
        other = tmp_path / "other.db"
        with closing(connect(other)) as connection:
            insert(connection, 77)
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        os.replace(other, database)
        application = connect(database)
        insert(application, 1)
        engine.wait(timeout_s=TIMEOUT_S)
    assert len(generations(store.url)) == 2
    assert restore03(store.url, tmp_path / "theirs.db")
    assert rows(tmp_path / "theirs.db") == rows(application)
    application.close()


# -- settings --------------------------------------------------------------------------------------------------------------------


def test_drills_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no drills"):
        writer(tmp_path / "a.db", tmp_path.as_uri(), verify_interval_s=60)
    with pytest.raises(ConfigError, match=r"unknown format: 'v0\.4'"):
        Replicator(tmp_path / "a.db", tmp_path.as_uri(), format="v0.4")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_nothing_is_asked_of_the_store_while_nobody_writes(database: Path, tmp_path: Path) -> None:
    class Counting(Away):
        requests = 0

        def _reach(self) -> None:
            self.requests += 1

    store = Counting(tmp_path / "replica")
    application = connect(database)
    with writer(database, store) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        before = store.requests
        for _ in range(20):
            engine.wait(timeout_s=TIMEOUT_S)
        assert store.requests == before
        insert(application, 1)
        engine.wait(timeout_s=TIMEOUT_S)
        assert store.requests <= before + 3  # one object, and a look whether the path is still ours
    assert client(store.url).list_generations()
    application.close()


def test_what_restarts_the_wal_after_the_start_continues_the_generation(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    insert(application, 20)
    engine = v3_engine_for(database, store)
    engine.open()
    drain(engine)
    assert engine.checkpoint()
    engine.close()
    engine = v3_engine_for(database, store)
    engine.open()
    insert(application, 5)  # restarts the WAL before anybody has asked the engine to look
    drain(engine)
    engine.close()
    assert len(generations(store.url)) == 1
    assert is_exact(database, store.url, tmp_path)
    application.close()


def test_a_replica_that_goes_away_while_it_is_read_at_the_start_joins_later(tmp_path: Path, database: Path) -> None:
    class Unreadable(Away):
        broken = False

        def open_object(self, name, **options):
            if self.broken:
                raise StorageUnavailable("gone")
            return super().open_object(name, **options)

    one, two = Away(tmp_path / "one"), Unreadable(tmp_path / "two")
    application = connect(database)
    for broken in (False, True):
        two.broken = broken
        with writer(database, one, two) as engine:
            insert(application, 20)
            engine.wait(replicas="any", timeout_s=TIMEOUT_S)
            two.broken = False
            engine.wait(timeout_s=TIMEOUT_S)
    assert both_are_exact(database, (one, two), tmp_path)
    assert generations(one.url) == generations(two.url)
    assert len(generations(one.url)) == 1
    application.close()


def test_a_store_that_is_away_at_the_start_is_waited_for(tmp_path: Path, database: Path, store: Away) -> None:
    application = connect(database)
    insert(application, 20)
    store.down = True
    with writer(database, store) as engine:
        assert engine.status().state in ("starting", "degraded")
        store.down = False
        engine.wait(timeout_s=TIMEOUT_S)
    assert is_exact(database, store.url, tmp_path)
    application.close()
