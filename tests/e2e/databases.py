"""Small helpers for tests that replicate a real database."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import replicator
from replicator.storage import open_client


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


def restored(url: str, folder: Path, name: str = "restored.db", **options: object) -> Path:
    """Restore to a fresh path, with SQLite's own check."""
    output = folder / name
    output.unlink(missing_ok=True)
    replicator.restore(url, output, integrity_check="full", **options)  # type: ignore[arg-type]
    return output


def txids(url: str, level: int = 0) -> list[int]:
    """Return the TXIDs stored on a level."""
    return [info.max_txid for info in open_client(url).list(level)]
