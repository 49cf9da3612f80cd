"""Whatever an application and others do to a database, the restored bytes are those that SQLite itself makes of it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from replicator import Replicator
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids

TIMEOUT_S = 60


class ReplicationMachine(RuleBasedStateMachine):
    """Two application connections, a long reader, a foreign checkpointer, and an engine that starts, stops and dies."""

    @initialize(page_size=st.sampled_from([512, 1024, 4096, 65536]), auto_vacuum=st.sampled_from(["NONE", "FULL", "INCREMENTAL"]))
    def begin(self, page_size: int, auto_vacuum: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.database, self.url = self.folder / "a.db", f"file://{self.folder}/replica"
        self.one = connect(self.database, page_size=page_size, auto_vacuum=auto_vacuum, autocheckpoint=0)
        self.two = connect(self.database, autocheckpoint=5)
        for connection in (self.one, self.two):
            connection.execute("PRAGMA busy_timeout=5000")
        insert(self.one, 40, size=1500)
        self.schema = 0
        self.reader: sqlite3.Connection | None = None
        self.engine: Replicator | None = None
        self.start()

    def start(self) -> None:
        self.engine = Replicator(self.database, self.url, sync_interval_s=0.01, min_checkpoint_pages=8).start()

    def connection(self, which: bool) -> sqlite3.Connection:
        return self.one if which else self.two

    def synced(self, is_wanted: bool) -> None:
        """Let what was written become a file of its own: rules are faster than the engine, and what comes together is stored together."""
        if is_wanted and self.engine is not None:
            self.engine.wait(timeout_s=TIMEOUT_S)

    @rule(which=st.booleans(), rows=st.integers(1, 60), size=st.integers(0, 3000), sync=st.booleans())
    def insert(self, which: bool, rows: int, size: int, sync: bool) -> None:
        self.connection(which).execute("BEGIN IMMEDIATE")
        self.connection(which).executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(size,)] * rows)
        self.connection(which).execute("COMMIT")
        self.synced(sync)

    @rule(which=st.booleans(), modulo=st.integers(2, 7), sync=st.booleans())
    def update(self, which: bool, modulo: int, sync: bool) -> None:
        self.connection(which).execute("UPDATE t SET v = randomblob(50) WHERE id % ? = 0", (modulo,))
        self.synced(sync)

    @rule(which=st.booleans(), modulo=st.integers(1, 4), sync=st.booleans())
    def delete(self, which: bool, modulo: int, sync: bool) -> None:
        self.connection(which).execute("DELETE FROM t WHERE id % ? = 0", (modulo,))
        self.synced(sync)

    @rule(which=st.booleans())
    def roll_back(self, which: bool) -> None:
        self.connection(which).execute("BEGIN IMMEDIATE")
        self.connection(which).executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(2000,)] * 40)
        self.connection(which).execute("ROLLBACK")

    @rule()
    def change_schema(self) -> None:
        self.schema += 1
        self.one.execute(f"CREATE TABLE x{self.schema}(a UNIQUE, b)")
        self.one.execute(f"INSERT INTO x{self.schema} SELECT id, v FROM t LIMIT 20")
        if self.schema % 3 == 0:
            self.one.execute(f"DROP TABLE x{self.schema - 1}")

    @precondition(lambda self: self.reader is None)
    @rule(incremental=st.booleans(), sync=st.booleans())
    def vacuum(self, incremental: bool, sync: bool) -> None:
        self.one.execute("PRAGMA incremental_vacuum(3)" if incremental else "VACUUM").fetchall()
        self.synced(sync)

    @rule(mode=st.sampled_from(["PASSIVE", "FULL", "RESTART", "TRUNCATE"]))
    def foreign_checkpoint(self, mode: str) -> None:
        self.two.execute("PRAGMA busy_timeout=5")
        self.two.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        self.two.execute("PRAGMA busy_timeout=5000")

    @rule()
    def toggle_reader(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None
            return
        self.reader = connect(self.database)
        self.reader.execute("BEGIN")
        self.reader.execute("SELECT count(*) FROM t").fetchone()

    @precondition(lambda self: self.engine is not None)
    @rule(dies=st.booleans())
    def stop(self, dies: bool) -> None:
        """In order, or between any two steps, without a last sync."""
        engine = self.engine
        assert engine is not None
        if not dies:
            engine.close()
            self.engine = None
            return
        with engine._board.changed:
            engine._board.stop = True
            engine._board.changed.notify_all()
        for thread in engine._threads:
            thread.join()
        engine._engine.close()
        self.engine = None

    @precondition(lambda self: self.engine is None)
    @rule()
    def start_again(self) -> None:
        self.start()

    @precondition(lambda self: self.engine is not None)
    @rule()
    def take_snapshot(self) -> None:
        assert self.engine is not None
        self.engine.snapshot(timeout_s=TIMEOUT_S)

    @precondition(lambda self: self.engine is not None)
    @rule()
    def acknowledged_is_restored(self) -> None:
        assert self.engine is not None
        self.engine.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(self.database, self.folder)
        output = restored(self.url, self.folder)
        assert output.read_bytes() == expected
        connection = sqlite3.connect(output)
        theirs = connection.execute("SELECT * FROM sqlite_master").fetchall()
        connection.close()
        assert theirs == self.one.execute("SELECT * FROM sqlite_master").fetchall()

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            if self.engine is None:
                self.start()
            self.acknowledged_is_restored()
            chain = txids(self.url)
            assert chain == list(range(1, len(chain) + 1))
            for txid in chain[:: max(1, len(chain) // 10)]:
                restored(self.url, self.folder, txid=txid)
        finally:
            if self.engine is not None:
                self.engine.close()
            for connection in (self.one, self.two, self.reader):
                if connection is not None:
                    connection.close()
            shutil.rmtree(self.folder)


TestReplication = pytest.mark.fault("F15", "F16")(ReplicationMachine.TestCase)
TestReplication.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
