"""Compaction, full images, retention, commits, checkpoints and restores at the same time: every state that can be restored is right."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator import Replicator, restore
from replicator.chain import list_files
from replicator.errors import RestoreError
from replicator.levels import History
from replicator.plan import plan_restore
from replicator.storage import open_client
from tests.e2e.databases import connect

TIMEOUT_S = 60
RESTLESS = History(
    (0.05, 0.15, 0.4), snapshot_interval_s=0.3, snapshot_retention_s=0.6, l0_retention_s=0.1, l0_retention_check_interval_s=0.02
)


def content(path: Path) -> str:
    """A digest of all rows."""
    connection = sqlite3.connect(path)
    try:
        digest = hashlib.sha256()
        for row in connection.execute("SELECT id, v FROM t ORDER BY id"):
            digest.update(repr(row).encode())
        return digest.hexdigest()
    finally:
        connection.close()


def restorable(url: str) -> list[int]:
    """All TXIDs that end a stored file and that a plan leads to, at this moment."""
    files = list_files(open_client(url))
    found = []
    for txid in sorted({info.max_txid for infos in files.values() for info in infos}):
        try:
            plan_restore(files, txid=txid)
        except RestoreError:
            continue
        found.append(txid)
    return found


def commits_and_everything_else(folder: Path, rounds: int) -> None:
    database, url = folder / "a.db", f"file://{folder}/replica"
    application = connect(database, autocheckpoint=7)
    other = sqlite3.connect(database, isolation_level=None, timeout=30, check_same_thread=False)
    model: dict[int, str] = {}
    stop, errors = threading.Event(), []

    def repeatedly(what: Callable[[], object], every_s: float) -> threading.Thread:
        def run() -> None:
            while not stop.wait(every_s):
                try:
                    what()
                except BaseException as error:
                    errors.append(error)
                    return

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with Replicator(database, url, history=RESTLESS, min_checkpoint_pages=20) as engine:
        application.execute("INSERT INTO t(v) VALUES(1)")
        model[engine.wait(timeout_s=TIMEOUT_S)] = content(database)
        threads = [
            repeatedly(lambda: engine.snapshot(timeout_s=TIMEOUT_S), 0.2),
            repeatedly(lambda: other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall(), 0.01),
        ]
        try:
            checked = 0
            for number in range(rounds):
                application.execute("BEGIN")
                application.executemany("INSERT INTO t(v) VALUES(randomblob(200))", [()] * (number % 13))
                application.execute("UPDATE t SET v = randomblob(90) WHERE id % 17 = ?", (number % 17,))
                if number % 29 == 28:
                    application.execute("DELETE FROM t WHERE id % 3 = 0")
                application.execute("COMMIT")
                model[engine.wait(timeout_s=TIMEOUT_S)] = content(database)
                if number % 20 == 19:
                    for txid in restorable(url):
                        try:
                            restore(url, folder / "r.db", txid=txid, force=True, integrity_check="full")
                        except RestoreError:
                            assert txid not in restorable(url)  # retention was faster
                            continue
                        assert content(folder / "r.db") == model[txid]
                        checked += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        status = engine.status()
        assert status.replicas[0].problems == ()
        assert checked >= rounds // 20
        keeper = next(iter(engine._keepers.values()))
        assert min(keeper.compactions, keeper.snapshots, keeper.deleted) > 0
    for txid in restorable(url):
        restore(url, folder / "r.db", txid=txid, force=True, integrity_check="full")
        assert content(folder / "r.db") == model[txid]
    other.close()
    application.close()


def test_sixty_rounds_of_everything_at_once(tmp_path: Path) -> None:
    commits_and_everything_else(tmp_path, 60)


@pytest.mark.slow
def test_a_hundred_rounds_of_everything_at_once(tmp_path: Path) -> None:
    commits_and_everything_else(tmp_path, 100)


@pytest.mark.parametrize("protected", [True, False])
def test_two_hundred_restores_while_retention_deletes(tmp_path: Path, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the note that a restore leaves for retention, and without it (as from another machine), where it has to plan again."""
    if not protected:
        monkeypatch.setattr("replicator.api.planned", lambda url: set())
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    stop, errors = threading.Event(), []

    def write(engine: Replicator) -> None:
        try:
            while not stop.wait(0.005):
                application.execute("INSERT INTO t(v) VALUES(randomblob(500))")
                application.execute("DELETE FROM t WHERE id < (SELECT max(id) FROM t) - 200")
        except BaseException as error:
            errors.append(error)

    with Replicator(database, url, history=RESTLESS, sync_interval_s=0.005) as engine:
        application.execute("INSERT INTO t(v) VALUES(1)")
        newest = engine.wait(timeout_s=TIMEOUT_S)
        writer = threading.Thread(target=write, args=(engine,))
        writer.start()
        try:
            for _ in range(200):
                result = restore(url, tmp_path / "r.db", force=True, integrity_check="quick")
                assert result.txid >= newest
                newest = result.txid
        finally:
            stop.set()
            writer.join()
        keeper = next(iter(engine._keepers.values()))
        assert keeper.deleted > 10
    assert errors == []
    application.close()
