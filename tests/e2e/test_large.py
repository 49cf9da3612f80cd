"""What takes a large database: the lock page at 1 GiB, and a full image while commits and checkpoints go on."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from replicator import Replicator, restore
from replicator.format.ltx import TXID
from replicator.storage import open_client
from replicator.storage.s3 import S3Client
from tests.compat.litestream import restore as litestream_restore
from tests.e2e.databases import checkpointed_bytes, connect, insert

TIMEOUT_S = 300
LOCK_BYTE = 0x40000000


def same_file(one: Path, two: Path) -> bool:
    with one.open("rb") as first, two.open("rb") as second:
        while True:
            a, b = first.read(1 << 22), second.read(1 << 22)
            if a != b:
                return False
            if not a:
                return True


@pytest.mark.fault("F20")
@pytest.mark.slow
def test_a_database_crosses_the_lock_page(tmp_path: Path) -> None:
    """Growth below and above 1 GiB, as a full image and as increments; the released Litestream agrees."""
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database, page_size=65536)
    application.execute("PRAGMA synchronous=OFF")

    def grow(to: int) -> None:
        while application.execute("PRAGMA page_count").fetchone()[0] * 65536 < to:
            application.execute("INSERT INTO t(v) VALUES(zeroblob(32000000))")

    grow(LOCK_BYTE - (40 << 20))
    with Replicator(database, url) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        grow(LOCK_BYTE + (40 << 20))
        engine.wait(timeout_s=TIMEOUT_S)
        application.execute("UPDATE t SET v = randomblob(100) WHERE id = 3")
        insert(application, 10)
        engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
        newest = engine.status().txid
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    application.close()
    restore(url, tmp_path / "ours.db")
    assert same_file(tmp_path / "ours.db", database)
    (tmp_path / "ours.db").unlink()
    client = open_client(url)
    client.delete(client.list(9))
    restore(url, tmp_path / "ours.db", txid=newest, integrity_check="quick")
    assert same_file(tmp_path / "ours.db", database)
    litestream_restore(url, tmp_path / "theirs.db")
    assert same_file(tmp_path / "theirs.db", database)
    shutil.rmtree(tmp_path / "replica")


def race(folder: Path, url: str, megabytes: int, rounds: int) -> None:
    database = folder / "a.db"
    application = connect(database)
    application.execute("PRAGMA synchronous=OFF")
    size = 2000
    for _ in range(megabytes):
        insert(application, 1_000_000 // size, size=size)
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    last = application.execute("SELECT max(id) FROM t").fetchone()[0]
    with Replicator(database, url, sync_interval_s=0.02, min_checkpoint_pages=200) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
        for number in range(rounds):
            taken: list[TXID] = []
            thread = threading.Thread(target=lambda into=taken: into.append(engine.snapshot()))
            thread.start()
            checkpoints = engine.status().checkpoints
            for commit in range(200):
                application.execute("BEGIN")
                for step in range(20):
                    application.execute("UPDATE t SET v = randomblob(1999) WHERE id = ?", ((commit * 7919 + step * 104729) % last + 1,))
                application.execute("COMMIT")
                engine.wait(timeout_s=TIMEOUT_S)
            thread.join()
            engine.wait(timeout_s=TIMEOUT_S)
            assert engine.status().checkpoints > checkpoints + 2
            output = folder / "r.db"
            restore(url, output, force=True)
            assert output.read_bytes() == checkpointed_bytes(database, folder), f"round {number}"
            connection = sqlite3.connect(output)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()
            [txid] = taken
            assert [info.max_txid for info in open_client(url).list(9)][-1] == txid
    application.close()


def test_a_full_image_in_a_bucket_is_exact_under_load(tmp_path: Path, seaweed) -> None:
    race(tmp_path, seaweed.url("race"), 30, 1)


@pytest.mark.parametrize(
    ("megabytes", "rounds"),
    [pytest.param(150, 2, marks=pytest.mark.slow), pytest.param(500, 10, marks=[pytest.mark.scheduled, pytest.mark.timeout(900)])],
)
def test_a_large_full_image_in_a_bucket_is_exact_under_load(tmp_path: Path, seaweed, megabytes: int, rounds: int) -> None:
    """The scenario in which the released 0.5.17 writes corrupt snapshots (docs/design.md)."""
    race(tmp_path, seaweed.url(f"large-{megabytes}"), megabytes, rounds)


def test_the_s3_client_is_the_real_one(seaweed) -> None:
    assert isinstance(open_client(seaweed.url("x")), S3Client)
