"""Small helpers for tests that replicate a real database."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import replicator
from replicator.checkpoint import CheckpointPolicy
from replicator.engine import Engine
from replicator.errors import StorageUnavailable
from replicator.replica import Replica
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.storage.memory import MemoryClient


def connect(path: Path, *, page_size: int = 4096, autocheckpoint: int = 1000, auto_vacuum: str = "NONE") -> sqlite3.Connection:
    """Open, or create in WAL mode."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    connection.execute(f"PRAGMA page_size={page_size}")
    connection.execute(f"PRAGMA auto_vacuum={auto_vacuum}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint={autocheckpoint}")
    connection.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v BLOB)")
    return connection


def insert(connection: sqlite3.Connection, rows: int, size: int = 300) -> None:
    """Insert rows in one transaction."""
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(size,)] * rows)
    connection.execute("COMMIT")


def checkpointed_bytes(database: Path, folder: Path) -> bytes:
    """Return the bytes that SQLite itself makes of database and WAL, from copies; nobody may write meanwhile."""
    copy = folder / "expected.db"
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)
        source = database.with_name(database.name + suffix)
        if source.exists():
            shutil.copy(source, copy.with_name(copy.name + suffix))
    connection = sqlite3.connect(copy)
    assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    connection.close()
    return copy.read_bytes()


def restored(url: str | ReplicaClient, folder: Path, name: str = "restored.db", **options: object) -> Path:
    """Restore to a fresh path, with SQLite's own check."""
    output = folder / name
    output.unlink(missing_ok=True)
    replicator.restore(url, output, integrity_check="full", **options)  # type: ignore[arg-type]
    return output


def txids(url: str, level: int = 0) -> list[int]:
    """Return the TXIDs stored on a level."""
    return [info.max_txid for info in open_client(url).list(level)]


def rows(database: Path | sqlite3.Connection) -> list[tuple[object, ...]]:
    """Return the content of the table `t`."""
    connection = database if isinstance(database, sqlite3.Connection) else sqlite3.connect(database)
    try:
        return connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    finally:
        if connection is not database:
            connection.close()


def until(holds: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait for a condition that no event tells of."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Flaky(MemoryClient):
    """A store that is out of reach while `down` is true."""

    def __init__(self, name: str = "store") -> None:
        super().__init__()
        self.url = f"memory://{name}"
        self.down = False

    def _reach(self) -> None:
        if self.down:
            raise StorageUnavailable(f"{self.url} is out of reach")

    def list(self, *args, **options):
        self._reach()
        return super().list(*args, **options)

    def open(self, *args, **options):
        self._reach()
        return super().open(*args, **options)

    def put(self, *args, **options):
        self._reach()
        return super().put(*args, **options)

    def get_control(self, name):
        self._reach()
        return super().get_control(name)

    def put_control(self, name, data, **options):
        self._reach()
        return super().put_control(name, data, **options)

    def names(self, level: int) -> list[tuple[int, int]]:
        """Return the TXID ranges that are stored on a level, whether in reach or not."""
        return [(info.min_txid, info.max_txid) for info in super().list(level)]


def engine_for(
    database: Path,
    *clients: ReplicaClient,
    meta_path: Path | None = None,
    writer: int = 7,
    busy_timeout_s: float = 1,
    policy: CheckpointPolicy | None = None,
    **options,
) -> Engine:
    """Return an engine without threads. It never checkpoints by itself; `policy` says when one is due, which is never otherwise."""
    return Engine(
        database,
        [Replica(client, writer=writer) for client in clients],
        meta_path=meta_path or database.with_name(f".{database.name}-litestream"),
        policy=policy or CheckpointPolicy(10**9, 0),
        busy_timeout_s=busy_timeout_s,
        staging_limit_bytes=1 << 30,
        **options,
    )


def drain(engine: Engine) -> None:
    """Store everything that is committed on all replicas."""
    while (entry := engine.advance()) is not None:
        for replica in engine.replicas:
            replica.store(entry.files, entry.txid)
        engine.settled(entry)


def damage_files(client: MemoryClient, *, level: int) -> None:
    """Flip a bit in the middle of each file of a level."""
    for key, stored in list(client._store.files.items()):
        if stored.info.level == level:
            data = bytearray(stored.data)
            data[len(data) // 2] ^= 1
            client._store.files[key] = type(stored)(stored.info, bytes(data), stored.metadata)
