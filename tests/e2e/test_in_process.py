"""An application and the engine in one process: SQLite's locks stay intact."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replicator import Replicator
from tests.e2e.databases import checkpointed_bytes, connect, restored

OTHER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    connection.execute("INSERT INTO t(v) VALUES(randomblob(300))")
    connection.execute("UPDATE counter SET n = n + 1")
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
"""


def descriptors(path: Path) -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                found.add(int(name))
        except FileNotFoundError:
            continue
    return found


def hammer(folder: Path, seconds: float) -> None:
    database, url = folder / "a.db", f"file://{folder}/replica"
    application = connect(database)
    application.execute("CREATE TABLE counter(n)")
    application.execute("INSERT INTO counter VALUES(0)")
    errors: list[BaseException] = []
    increments = [0] * 4

    def work(number: int) -> None:
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                connection = sqlite3.connect(database, isolation_level=None, timeout=60)
                for _ in range(20):
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("INSERT INTO t(v) VALUES(randomblob(500))")
                    connection.execute("UPDATE counter SET n = n + 1")
                    connection.execute("COMMIT")
                    increments[number] += 1
                connection.close()  # closing connections is what drops locks, when somebody holds a descriptor wrongly
        except BaseException as error:
            errors.append(error)

    with Replicator(database, url, min_checkpoint_pages=100) as engine:
        others = [subprocess.Popen([sys.executable, "-c", OTHER, str(database), str(seconds)]) for _ in range(2)]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [other.wait(60) for other in others] == [0, 0]
        assert errors == []
        engine.wait(timeout_s=60)
        assert application.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert application.execute("SELECT n FROM counter").fetchone()[0] >= sum(increments)
        assert engine.status().checkpoints > 0
        assert restored(url, folder).read_bytes() == checkpointed_bytes(database, folder)
    application.close()


def test_four_threads_and_two_processes_for_three_seconds(tmp_path: Path) -> None:
    hammer(tmp_path, 3)


@pytest.mark.slow
def test_four_threads_and_two_processes_for_fifteen_seconds(tmp_path: Path) -> None:
    hammer(tmp_path, 15)


def test_the_descriptor_of_the_database_is_never_closed_and_never_doubled(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url):
        pass
    application.close()
    first = descriptors(database)
    assert len(first) == 1
    for _ in range(3):
        with Replicator(database, url):
            assert first <= descriptors(database)
        assert descriptors(database) == first
    assert descriptors(tmp_path / "a.db-shm") == set()
