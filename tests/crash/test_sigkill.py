"""kill -9 at random moments: nothing acknowledged is lost, and the next start is exact."""

from __future__ import annotations

import fcntl
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from replicator import Replicator
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored

CHILD = """
import sqlite3, sys
from replicator import Replicator
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
with Replicator(sys.argv[1], sys.argv[2], sync_interval_s=0.001, min_checkpoint_pages=30) as engine:
    for number in range(100000):
        connection.execute("INSERT INTO t(v) VALUES(randomblob(700))")
        if number % 3 == 0:
            engine.wait(timeout_s=60)
            print(connection.execute("SELECT max(id) FROM t").fetchone()[0], flush=True)
"""


def kill_rounds(folder: Path, rounds: int) -> None:
    database, url = folder / "a.db", f"file://{folder}/replica"
    connect(database).close()
    source = random.Random(7)
    for _ in range(rounds):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(database), url], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        acknowledged = 0
        for _ in range(source.randrange(1, 60)):
            acknowledged = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
        child.wait()
        child.stdout.close()
        connection = sqlite3.connect(restored(url, folder))
        assert connection.execute("SELECT max(id) FROM t").fetchone()[0] >= acknowledged
        connection.close()
    with Replicator(database, url) as engine:
        engine.wait(timeout_s=60)
        assert restored(url, folder).read_bytes() == checkpointed_bytes(database, folder)
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name]
    assert left == []


@pytest.mark.fault("F1")
def test_ten_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 10)


@pytest.mark.slow
def test_thirty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 30)


@pytest.mark.parametrize("format", ["ltx", "v0.3"])
def test_what_dead_writers_left_is_swept_wherever_it_lies(tmp_path: Path, format: Literal["ltx", "v0.3"]) -> None:
    """Also in a generation, or on a level, that nobody writes to again soon. What a living one writes stays."""
    database, root = tmp_path / "a.db", tmp_path / "replica"
    application = connect(database)
    with Replicator(database, f"file://{root}", format=format) as engine:
        insert(application, 5)
        engine.snapshot(timeout_s=60)
    (root / "generations" / ("0" * 16) / "snapshots").mkdir(parents=True)
    folders = [path for path in (root, *root.rglob("*"), *tmp_path.glob(".a.db-litestream/pyrepl/**")) if path.is_dir()]
    assert len(folders) > 6
    for folder in folders:
        (folder / ".pyrepl-0123456789abcdef.tmp").write_bytes(b"half")
    alive = root / ".pyrepl-fedcba9876543210.tmp"
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with Replicator(database, f"file://{root}", format=format) as engine:
            insert(application, 5)
            engine.wait(timeout_s=60)
    application.close()
    assert [path for path in tmp_path.rglob("*.tmp") if path != alive] == []
    assert alive.exists()
