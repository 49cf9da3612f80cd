"""The released Litestream 0.5.17 restores what we write, continues it, and is continued by us."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from replicator import Replicator, restore
from tests.compat.litestream import VERSION, litestream, replicate_once
from tests.compat.litestream import restore as litestream_restore
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids
from tests.e2e.stores import on_each_store

TIMEOUT_S = 60


def every_txid_is_equal(url: str, folder: Path) -> None:
    """Both restore each TXID (of a bucket: each third, and the newest) to the same bytes, and both run integrity_check."""
    chain = txids(url)
    assert chain
    assert chain == list(range(chain[0], chain[-1] + 1))
    for txid in chain if url.startswith("file") else [*chain[:-1:3], chain[-1]]:
        theirs = folder / f"theirs-{txid}.db"
        litestream_restore(url, theirs, "-txid", f"{txid:016x}")
        assert restored(url, folder, txid=txid).read_bytes() == theirs.read_bytes()
        theirs.unlink()


def test_it_is_the_released_version() -> None:
    assert litestream("version").stdout.strip() == VERSION


@on_each_store
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_it_restores_every_txid_that_we_wrote(tmp_path: Path, url: str, page_size: int) -> None:
    database = tmp_path / "a.db"
    application = connect(database, page_size=page_size)
    with Replicator(database, url, min_checkpoint_pages=10) as engine:
        for step in range(8):
            insert(application, 30)
            if step == 5:
                application.execute("DELETE FROM t WHERE id > 40")
                application.execute("VACUUM")
            engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
    every_txid_is_equal(url, tmp_path)
    theirs = tmp_path / "theirs.db"
    litestream_restore(url, theirs)
    assert theirs.read_bytes() == checkpointed_bytes(database, tmp_path)
    listing = litestream("ltx", "-level", "all", url)
    assert listing.returncode == 0
    stored = sum(len(txids(url, level=level)) for level in range(10))  # on level 1, too, when half a minute was over meanwhile
    assert len(listing.stdout.splitlines()) == 1 + stored
    application.close()


def test_it_restores_from_a_bucket(tmp_path: Path, seaweed) -> None:
    database, url = tmp_path / "a.db", seaweed.url("judge")
    application = connect(database)
    with Replicator(database, url, sync_interval_s=0.05) as engine:
        for _ in range(5):
            insert(application, 30)
            engine.wait(timeout_s=TIMEOUT_S)
    expected = checkpointed_bytes(database, tmp_path)
    restore(url, tmp_path / "ours.db", integrity_check="full")
    litestream_restore(url, tmp_path / "theirs.db")
    assert (tmp_path / "ours.db").read_bytes() == (tmp_path / "theirs.db").read_bytes() == expected
    application.close()


@on_each_store
def test_each_continues_what_the_other_began(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 50)
    for round_number in range(3):
        with Replicator(database, url) as engine:
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
            assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        insert(application, 20)
        replicate_once(database, url, tmp_path)
        if round_number == 1:
            application.execute("VACUUM")
    every_txid_is_equal(url, tmp_path)
    assert rows(restored(url, tmp_path)) == rows(database)
    application.close()


def test_we_continue_what_it_began_and_it_comes_back_with_unsent_files(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    insert(application, 50)
    replicate_once(database, url, tmp_path)
    insert(application, 20)
    # It syncs locally, but cannot upload: its local files are ahead of the replica when it stops.
    replicate_once(database, f"file://{tmp_path}/elsewhere", tmp_path)
    assert len(list((tmp_path / ".a.db-litestream/ltx/0").iterdir())) > len(txids(url))
    with Replicator(database, url) as engine:
        insert(application, 20)
        engine.wait(timeout_s=TIMEOUT_S)
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    assert list((tmp_path / ".a.db-litestream/pyrepl").glob("salvaged-ltx-*"))
    insert(application, 20)
    replicate_once(database, url, tmp_path)
    every_txid_is_equal(url, tmp_path)
    assert rows(restored(url, tmp_path)) == rows(database)
    application.close()


def rows(path: Path) -> list[tuple[int, bytes]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    finally:
        connection.close()
