"""While the engine is stopped anybody may do anything to the database. On restart exactly the pages that differ are uploaded."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.errors import LineageMismatch
from replicator.format.ltx import decode_file
from replicator.storage import open_client
from tests.compat.litestream import replicate_once
from tests.compat.litestream import restore as litestream_restore
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids
from tests.e2e.stores import on_each_store

TIMEOUT_S = 60


def differing_pages(old: bytes, new: bytes, page_size: int) -> set[int]:
    """Page numbers of `new` that `old` lacks or has otherwise."""
    count = len(new) // page_size
    return {n + 1 for n in range(count) if old[n * page_size : (n + 1) * page_size] != new[n * page_size : (n + 1) * page_size]}


def uploaded_pages(url: str) -> set[int]:
    """Page numbers in the newest raw file."""
    client = open_client(url)
    *_, newest = client.list(0)
    with client.open(newest) as stream:
        return {pgno for pgno, _ in decode_file(stream.read())[1]}


def autocheckpoint(path: Path) -> None:
    """The released 0.5.17 loses rows here: the WAL restarts, and stays shorter than the old position."""
    connection = connect(path)
    for _ in range(30):
        insert(connection, 200)
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    insert(connection, 1)
    connection.close()


def truncate(path: Path) -> None:
    connection = connect(path)
    insert(connection, 100)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("UPDATE t SET v = 1 WHERE id = 7")
    connection.close()


def vacuum(path: Path) -> None:
    connection = connect(path)
    connection.execute("DELETE FROM t WHERE id % 2")
    connection.execute("VACUUM")
    connection.close()


def leave_wal_mode(path: Path) -> None:
    connection = connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    insert(connection, 100)
    connection.close()


def replace_file(path: Path) -> None:
    other = path.with_name("other.db")
    connection = connect(other)
    insert(connection, 77)
    connection.close()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.replace(other, path)


def change_page_size(path: Path) -> None:
    connection = connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA page_size=1024")
    connection.execute("VACUUM")
    connection.close()


@pytest.mark.fault("F10")
@on_each_store
@pytest.mark.parametrize("happens", [autocheckpoint, truncate, vacuum, leave_wal_mode, replace_file, change_page_size])
@pytest.mark.parametrize("application_stays", [False, True])
def test_only_differing_pages_are_uploaded_after_downtime(
    tmp_path: Path, url: str, happens: Callable[[Path], None], application_stays: bool
) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 2000)
    with Replicator(database, url):
        insert(application, 10)
    before = restored(url, tmp_path).read_bytes()
    if not application_stays or happens in (leave_wal_mode, replace_file, change_page_size):
        application.close()
    happens(database)
    with Replicator(database, url) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
    application.close()
    assert restored(url, tmp_path).read_bytes() == expected
    if happens is not change_page_size:
        assert uploaded_pages(url) == differing_pages(before, expected, 4096)
    chain = txids(url)
    assert chain == list(range(1, len(chain) + 1))
    for txid in chain:
        restored(url, tmp_path, txid=txid)


@pytest.mark.fault("F69")
def test_the_released_litestream_loses_rows_where_we_do_not(tmp_path: Path) -> None:
    """Side by side: while both are stopped the WAL restarts, and stays shorter than the position at which they had stopped."""
    database, theirs, ours = tmp_path / "a.db", f"file://{tmp_path}/theirs", f"file://{tmp_path}/ours"
    application = connect(database, autocheckpoint=0)

    def both() -> None:
        replicate_once(database, theirs, tmp_path)
        with Replicator(database, ours, meta_path=tmp_path / "meta") as engine:
            engine.wait(timeout_s=TIMEOUT_S)

    for _ in range(20):
        insert(application, 10)
    both()
    for _ in range(2):
        insert(application, 100)
    both()
    application.execute("PRAGMA wal_autocheckpoint=1000")
    for _ in range(150):
        insert(application, 10)
    application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    insert(application, 5)
    both()
    expected = application.execute("SELECT count(*) FROM t").fetchone()[0]
    application.close()

    def rows(path: Path) -> int:
        connection = sqlite3.connect(path)
        try:
            return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])
        finally:
            connection.close()

    assert rows(restored(ours, tmp_path)) == expected == 1905
    litestream_restore(theirs, tmp_path / "theirs.db")  # its integrity check passes, too
    assert rows(tmp_path / "theirs.db") < expected


@pytest.mark.fault("F70")
@on_each_store
def test_a_deleted_metadata_folder_is_rebuilt_from_the_replica(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 500)
    with Replicator(database, url):
        pass
    before = restored(url, tmp_path).read_bytes()
    shutil.rmtree(tmp_path / ".a.db-litestream")
    application.execute("UPDATE t SET v = 1 WHERE id = 100")
    with Replicator(database, url) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    expected = checkpointed_bytes(database, tmp_path)
    assert restored(url, tmp_path).read_bytes() == expected
    assert uploaded_pages(url) == differing_pages(before, expected, 4096)
    application.close()


@pytest.mark.fault("F2")
@on_each_store
@pytest.mark.parametrize("damage", ["flip an entry", "truncate", "older copy"])
def test_a_damaged_page_table_is_found_and_rebuilt(tmp_path: Path, url: str, damage: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 500)
    table = tmp_path / ".a.db-litestream/pyrepl/pages"
    with Replicator(database, url):
        pass
    older = table.read_bytes()
    with Replicator(database, url):
        insert(application, 5)
    data = bytearray(table.read_bytes())
    if damage == "flip an entry":
        data[4096 + 8 * 3] ^= 1
    table.write_bytes({"flip an entry": bytes(data), "truncate": bytes(data[:5000]), "older copy": older}[damage])
    insert(application, 5)
    with Replicator(database, url) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.fault("F70")
def test_metadata_of_another_database_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        application = connect(tmp_path / f"{name}.db")
        insert(application, 10)
        application.close()
        with Replicator(tmp_path / f"{name}.db", f"file://{tmp_path}/{name}"):
            pass
    shutil.rmtree(tmp_path / ".a.db-litestream")
    shutil.copytree(tmp_path / ".b.db-litestream", tmp_path / ".a.db-litestream")
    with pytest.raises(LineageMismatch):
        Replicator(tmp_path / "a.db", f"file://{tmp_path}/a").start()


@pytest.mark.fault("F49")
@on_each_store
def test_a_restored_copy_continues_the_chain(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 100)
    with Replicator(database, url):
        pass
    application.close()
    moved = restored(url, tmp_path, "moved.db")
    with Replicator(moved, url) as engine:
        again = connect(moved)
        insert(again, 5)
        assert engine.wait(timeout_s=TIMEOUT_S) == 2
    assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(moved, tmp_path)
    again.close()
    litestream_restore(url, tmp_path / "judge.db")
