"""The released 0.3.13 and 0.5.17 restore what we write in format 0.3: every generation, every index, every time."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.format.v3 import SegmentInfo, SnapshotInfo
from replicator.v3chain import content_of
from tests.compat.litestream03 import VERSION, litestream03, replicating03, restore03
from tests.compat.v3history import TIMEOUT_S, History, client, generations, integrity, restore05, rfc3339, stored
from tests.e2e.databases import checkpointed_bytes, connect, insert, rows, until


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


@pytest.fixture
def local(tmp_path: Path) -> str:
    return f"file://{tmp_path}/replica"


def writer(database: Path, *urls: str, **options) -> Replicator:
    return Replicator(database, *urls, format="v0.3", **options)


def test_it_is_the_released_version() -> None:
    assert litestream03("version").stdout.strip() == f"v{VERSION}"


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_every_generation_index_and_time_comes_back(tmp_path: Path, database: Path, local: str, page_size: int) -> None:
    history = History(database, local, tmp_path)
    application = connect(database, page_size=page_size)
    for run in range(2):
        with writer(database, local, min_checkpoint_pages=12) as engine:
            for step in range(8):
                insert(application, 25)
                if step == 3:
                    engine.snapshot()
                if step == 5:
                    application.execute("DELETE FROM t WHERE id % 3")
                    application.execute("VACUUM")
                history.note(engine)
            assert engine.status().checkpoints
        if run == 0:
            insert(application, 5)
            application.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            insert(application, 5)
    history.check()
    assert len(generations(local)) == 2
    assert restore05(local, tmp_path / "early.db", "-timestamp", rfc3339(history.states[2][1])) == history.states[2][2]
    application.close()


def test_auto_vacuum_shrinks_inside_an_index(tmp_path: Path, database: Path, local: str) -> None:
    history = History(database, local, tmp_path)
    application = connect(database, page_size=1024, auto_vacuum="FULL")
    with writer(database, local, min_checkpoint_pages=60) as engine:
        for step in range(10):
            insert(application, 40)
            history.note(engine)
            application.execute("DELETE FROM t WHERE id > ?", (20 * step,))
            history.note(engine)
    history.check()
    application.close()


def test_the_objects_are_those_of_the_peer(database: Path, local: str, tmp_path: Path) -> None:
    application = connect(database)
    with writer(database, local) as engine:
        for _ in range(3):
            insert(application, 10)
            engine.wait(timeout_s=TIMEOUT_S)
    headers = {path.read_bytes()[:7].hex() for path in (tmp_path / "replica" / "generations").rglob("*.lz4")}
    assert headers == {"04224d186470b9"}
    listed = litestream03("wal", local).stdout.splitlines()
    assert len(listed) == 1 + sum(isinstance(info, SegmentInfo) for info in stored(local))
    assert len(litestream03("snapshots", local).stdout.splitlines()) == 2
    assert application.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]
    application.close()


# -- starting again --------------------------------------------------------------------------------------------------------------


def test_more_frames_in_the_same_wal_continue_the_generation(tmp_path: Path, database: Path, local: str) -> None:
    history = History(database, local, tmp_path)
    application = connect(database)
    for _ in range(4):
        insert(application, 20)
        with writer(database, local, min_checkpoint_pages=15) as engine:
            history.note(engine)
            insert(application, 20)
            history.note(engine)
    assert len(generations(local)) == 1
    assert sum(isinstance(info, SnapshotInfo) for info in stored(local)) == 1
    history.check()
    application.close()


def autocheckpoint(path: Path) -> None:
    with closing(connect(path)) as connection:
        for _ in range(30):
            insert(connection, 200)
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        insert(connection, 1)


def truncate(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        insert(connection, 1)


def vacuum(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("DELETE FROM t WHERE id % 2")
        connection.execute("VACUUM")


def delete_wal(path: Path) -> None:
    with closing(connect(path)) as connection:
        insert(connection, 100)  # the last to close: SQLite copies the WAL, and deletes it


def change_page_size(path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA page_size=1024")
        connection.execute("VACUUM")
        connection.execute("PRAGMA journal_mode=WAL")


def replace_file(path: Path) -> None:
    other = path.with_name("other.db")
    with closing(connect(other)) as connection:
        insert(connection, 77)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.replace(other, path)


def lose_metadata(path: Path) -> None:
    shutil.rmtree(path.with_name(f".{path.name}-litestream"))


@pytest.mark.parametrize("change", [autocheckpoint, truncate, vacuum, delete_wal, change_page_size, replace_file, lose_metadata])
def test_after_downtime_what_is_stored_is_exact(tmp_path: Path, database: Path, local: str, change: Callable[[Path], None]) -> None:
    history = History(database, local, tmp_path)
    with closing(connect(database)) as application:
        insert(application, 60)
        with writer(database, local) as engine:
            history.note(engine)
            insert(application, 60)
            history.note(engine)
    change(database)
    with closing(connect(database)) as application, writer(database, local) as engine:
        history.note(engine)
        insert(application, 20)
        history.note(engine)
    history.check()
    assert len(generations(local)) == 2


def test_what_is_stored_must_be_whole_to_be_continued(tmp_path: Path, database: Path, local: str) -> None:
    application = connect(database)
    with writer(database, local, min_checkpoint_pages=10) as engine:
        for _ in range(12):
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
    segments = [info for info in stored(local) if isinstance(info, SegmentInfo)]
    newest = [info for info in segments if info.index == segments[-1].index]
    doomed = newest[-2] if len(newest) > 2 else next(info for info in segments if info.index == 1)
    client(local).delete([doomed])
    with writer(database, local) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
    assert len(generations(local)) == 2
    assert restore03(local, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
    application.close()


# -- the peer before and after ---------------------------------------------------------------------------------------------------


def test_it_continues_the_path_and_we_continue_after_it(tmp_path: Path, database: Path, local: str) -> None:
    config = tmp_path / "litestream03.yml"
    replica = {"url": local, "sync-interval": "50ms"}
    config.write_text(json.dumps({"dbs": [{"path": str(database), "monitor-interval": "50ms", "replicas": [replica]}]}))
    application = connect(database)
    for _ in range(2):
        insert(application, 30)
        with writer(database, local) as engine:
            insert(application, 30)
            engine.wait(timeout_s=TIMEOUT_S)
        assert restore03(local, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
        ours = generations(local)[-1]
        with replicating03(config) as process:
            insert(application, 30)
            until(lambda ours=ours: process.poll() is None and generations(local)[-1] != ours)
        insert(application, 3)
        assert restore03(local, tmp_path / "theirs.db")
        assert rows(tmp_path / "theirs.db") == rows(application)[:-3]
    with writer(database, local) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        assert restore03(local, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
        assert restore05(local, tmp_path / "theirs05.db") == checkpointed_bytes(database, tmp_path)
    application.close()


# -- snapshots under load --------------------------------------------------------------------------------------------------------


def broken_pairs(database: Path) -> int:
    """Each transaction writes one value to two rows that are far apart: a state in which they differ never was."""
    connection = sqlite3.connect(f"file:{database}?immutable=1", uri=True)
    try:
        found = connection.execute("SELECT count(*) FROM t a JOIN t b ON b.id = a.id + 2000 WHERE a.id <= 2000 AND a.v <> b.v").fetchone()
        return int(found[0])
    finally:
        connection.close()


def test_snapshots_are_exact_while_commits_and_checkpoints_go_on(
    tmp_path: Path, database: Path, local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.snapshot.SLICE_BYTES", 2048)
    application = connect(database, page_size=1024)
    application.executemany("INSERT INTO t(id, v) VALUES(?, printf('%0500d', 0))", ((number,) for number in range(1, 4001)))
    stop = threading.Event()

    def load() -> None:
        with closing(sqlite3.connect(database, isolation_level=None, timeout=30)) as connection:
            number = 0
            while not stop.is_set():
                number += 1
                connection.execute(
                    "UPDATE t SET v = printf('%0500d', ?) WHERE id IN (?1 * 37 % 2000 + 1, ?1 * 37 % 2000 + 2001)", (number,)
                )

    thread = threading.Thread(target=load)
    during = []
    with writer(database, local, min_checkpoint_pages=30) as engine:
        thread.start()
        try:
            for _ in range(5):
                before = engine.status().checkpoints
                engine.snapshot(timeout_s=TIMEOUT_S)
                during.append(engine.status().checkpoints - before)
                until(lambda before=before: engine.status().checkpoints > before)
        finally:
            stop.set()
            thread.join()
        engine.wait(timeout_s=TIMEOUT_S)
    assert sum(during)
    snapshots = [info for info in stored(local) if isinstance(info, SnapshotInfo)]
    assert len(snapshots) > 3
    assert restore03(local, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
    for snapshot in snapshots:
        restore03(local, tmp_path / "index.db", "-generation", snapshot.generation, "-index", f"{snapshot.index:08x}")
        assert integrity(tmp_path / "index.db") == "ok"
        assert broken_pairs(tmp_path / "index.db") == 0
        with client(local).open(snapshot) as stream:  # alone, without a WAL, it is a state as well
            (tmp_path / "alone.db").write_bytes(b"".join(content_of(stream)))
        assert integrity(tmp_path / "alone.db") == "ok"
        assert broken_pairs(tmp_path / "alone.db") == 0
    application.close()
