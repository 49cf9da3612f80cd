"""Databases and writers for the measurements.

    python -m bench.workload DATABASE RATE SECONDS AUTOCHECKPOINT

commits small rows, one transaction each, and prints what that took as JSON. RATE is in transactions a second, 0 for as fast as it
goes; AUTOCHECKPOINT is SQLite's setting in pages.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.engines import ENVIRONMENT
from replicator.format.ltx import decode_file

__all__ = ["Written", "change_rows", "make_database", "newest_marker", "start_writer"]

WORDS = [
    "alpha",
    "river",
    "stone",
    "invoice",
    "customer",
    "pending",
    "shipped",
    "blue",
    "north",
    "delta",
    "meeting",
    "because",
    "without",
    "through",
    "account",
    "payment",
    "order",
    "street",
    "garden",
    "window",
]
MARKER = re.compile(rb"SEQ=(\d{12});")


def make_database(path: Path, megabytes: float, *, seed: int = 1) -> None:
    """Make a database of about that size: rows as applications have them, 4 KiB pages, everything checkpointed."""
    chance = random.Random(seed)
    notes = [" ".join(chance.choices(WORDS, k=30)) for _ in range(2000)]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA page_size=4096")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, at REAL, name TEXT, email TEXT, note TEXT, tok BLOB)")
    while connection.execute("PRAGMA page_count").fetchone()[0] * 4096 < megabytes * 1e6:
        rows = [
            (
                1.7e9 + chance.random() * 1e7,
                " ".join(chance.choices(WORDS, k=2)),
                f"user{chance.randrange(10**7)}@example.com",
                notes[chance.randrange(2000)][chance.randrange(60) :],
                chance.randbytes(16),
            )
            for _ in range(2000)
        ]
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t(at,name,email,note,tok) VALUES(?,?,?,?,?)", rows)
        connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def change_rows(connection: sqlite3.Connection, number: int, count: int, rows: int) -> None:
    """Change `count` of `rows` rows, chosen by chance, in one transaction."""
    chance = random.Random(number)
    connection.execute("BEGIN")
    for _ in range(count):
        connection.execute("UPDATE t SET note=? WHERE id=?", (f"changed {number}", chance.randrange(1, rows)))
    connection.execute("COMMIT")


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer did. `commits`: marker and time of each, when it had a rate."""

    count: int
    seconds: float
    longest_ms: float
    commits: list[tuple[int, float]]


class Writer:
    """A writer in a process of its own."""

    def __init__(self, database: Path, rate: float, seconds: float, autocheckpoint: int) -> None:
        command = [sys.executable, "-m", "bench.workload", str(database), str(rate), str(seconds), str(autocheckpoint)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)

    def result(self, timeout_s: float = 300) -> Written:
        """Wait for the end."""
        output, _ = self._process.communicate(timeout=timeout_s)
        document = json.loads(output)
        return Written(document["count"], document["seconds"], document["longest_ms"], [tuple(pair) for pair in document["commits"]])


def start_writer(database: Path, *, rate: float, seconds: float, autocheckpoint: int = 1000) -> Writer:
    return Writer(database, rate, seconds, autocheckpoint)


def newest_marker(data: bytes) -> int:
    """Return the newest row's marker in an LTX file; -1 when it has none."""
    _, pages, _ = decode_file(data)
    return max((int(match[1]) for _, page in pages for match in MARKER.finditer(page)), default=-1)


def _write(path: str, rate: float, seconds: float, autocheckpoint: int) -> dict[str, object]:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint={autocheckpoint}")
    connection.execute("CREATE TABLE IF NOT EXISTS s(id INTEGER PRIMARY KEY, v TEXT)")
    filler = "x" * 84
    count, longest, commits = 0, 0.0, []
    began = time.time()
    while (now := time.time()) - began < seconds:
        if rate and now < began + count / rate:
            time.sleep(began + count / rate - now)
        count += 1
        before = time.perf_counter()
        connection.execute("INSERT INTO s(id, v) VALUES(?, ?)", (count, f"SEQ={count:012d};{filler}"))
        longest = max(longest, time.perf_counter() - before)
        if rate:
            commits.append((count, time.time()))
    return {"count": count, "seconds": time.time() - began, "longest_ms": longest * 1000, "commits": commits}


if __name__ == "__main__":
    print(json.dumps(_write(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
