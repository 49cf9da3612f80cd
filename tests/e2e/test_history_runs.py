"""The keepers of a running `Replicator`: merging, full images and deletion while an application writes."""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path

from replicator import Replicator
from replicator.levels import History
from replicator.restorer import restore_database
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import Flaky, checkpointed_bytes, connect, damage_files, insert, restored, until

TIMEOUT_S = 20

FAST = History(
    level_intervals_s=(0.2, 0.5, 1.0),
    snapshot_interval_s=1,
    l0_retention_s=0.3,
    l0_retention_check_interval_s=0.1,
    snapshot_retention_s=3,
)


def remaining_txids(client: MemoryClient) -> set[int]:
    """Return the TXIDs that must be restorable: where merged files and images end, from the oldest image on, and each raw file that
    follows one that is restorable. (Raw files whose beginning is deleted lead nowhere; with the peer, too.)"""
    merged = {info.max_txid for level in range(1, 10) for info in client.list(level)}
    oldest = min(info.max_txid for info in client.list(9))
    found = {txid for txid in merged if txid >= oldest}
    for info in client.list(0):
        if info.min_txid - 1 in found:
            found.add(info.max_txid)
    return found


def test_every_txid_that_remains_is_a_committed_state_after_ten_seconds_of_history(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database, page_size=1024)
    application.execute("CREATE TABLE counter(n)")
    application.execute("INSERT INTO counter VALUES(0)")
    source, states = random.Random(5), {}
    with Replicator(database, one, two, history=FAST, sync_interval_s=0.01, min_checkpoint_pages=200) as replicator:
        end, number = time.monotonic() + 10, 0
        while time.monotonic() < end:
            number += 1
            application.execute("BEGIN IMMEDIATE")
            application.execute("UPDATE counter SET n = ?", (number,))
            application.executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(source.randrange(2000),)] * 3)
            if number % 50 == 0:
                application.execute("DELETE FROM t WHERE id % 3 = ?", (number % 3,))
            application.execute("COMMIT")
            if number % 97 == 0:
                application.execute("VACUUM")
            states[replicator.wait(timeout_s=TIMEOUT_S)] = number
            time.sleep(0.005)
        expected = checkpointed_bytes(database, tmp_path)
        keepers = list(replicator._keepers.values())
        assert [keeper.problems for keeper in keepers] == [{}, {}]
        assert all(keeper.compactions > 10 and keeper.snapshots > 3 and keeper.deleted > 100 for keeper in keepers)
    application.close()
    for client in (one, two):
        assert restored(client, tmp_path).read_bytes() == expected
        assert len(client.names(0)) < len(states) // 2
        remaining = remaining_txids(client)
        assert len(remaining) > 10
        for txid in remaining:
            connection = sqlite3.connect(restored(client, tmp_path, txid=txid))
            [n] = connection.execute("SELECT n FROM counter").fetchone()
            assert n == states.get(txid, n)
            connection.close()


def test_a_replica_that_was_away_is_complete_though_the_other_has_deleted_what_it_lacks(tmp_path: Path) -> None:
    database, one, two = tmp_path / "a.db", Flaky("one"), Flaky("two")
    application = connect(database)
    with Replicator(database, one, two, history=FAST, sync_interval_s=0.01) as replicator:
        insert(application, 20)
        replicator.wait(timeout_s=TIMEOUT_S)
        two.down = True
        for _ in range(30):
            insert(application, 3)
            replicator.wait(replicas=[one.url], timeout_s=TIMEOUT_S)
        replicator._board._outbox.clear()  # as when they became many
        until(lambda: one.names(0)[0][0] > 5)
        two.down = False
        insert(application, 3)
        replicator.wait(timeout_s=TIMEOUT_S)
        assert restored(two, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_damaged_file_ends_in_a_full_image_and_not_in_silence(tmp_path: Path) -> None:
    history = History(level_intervals_s=(1,), snapshot_interval_s=3600, snapshot_retention_s=3600)
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    with Replicator(database, client, history=None) as replicator:
        for _ in range(3):
            insert(application, 20)
            replicator.wait(timeout_s=TIMEOUT_S)
    damage_files(client, level=0)
    with Replicator(database, client, history=history) as replicator:
        until(lambda: client.names(9))
        assert restored(client, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
        assert any("compaction" in problem for problem in replicator.status().replicas[0].problems) or client.names(9)
    restore_database(client, tmp_path / "again.db", integrity_check="full")
    application.close()
