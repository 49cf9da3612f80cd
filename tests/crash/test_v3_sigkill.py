"""kill -9 at random moments while format 0.3 is written: nothing acknowledged is lost, and what is stored is always exact."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from replicator import Replicator
from tests.compat.litestream03 import restore03
from tests.compat.v3history import generations, integrity, restore05
from tests.e2e.databases import checkpointed_bytes, connect

CHILD = """
import sqlite3, sys
from replicator import Replicator
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
with Replicator(sys.argv[1], sys.argv[2], format="v0.3", sync_interval_s=0.001, min_checkpoint_pages=30) as engine:
    for number in range(100000):
        connection.execute("INSERT INTO t(v) VALUES(randomblob(700))")
        if number % 3 == 0:
            engine.wait(timeout_s=60)
            print(connection.execute("SELECT max(id) FROM t").fetchone()[0], flush=True)
        if number % 50 == 20:
            engine.snapshot()
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
        restore03(url, folder / "theirs.db")
        assert integrity(folder / "theirs.db") == "ok"
        connection = sqlite3.connect(f"file:{folder}/theirs.db?immutable=1", uri=True)
        assert connection.execute("SELECT max(id) FROM t").fetchone()[0] >= acknowledged
        connection.close()
    assert len(generations(url)) < rounds  # most kills are survived by the generation
    with Replicator(database, url, format="v0.3") as engine:
        engine.wait(timeout_s=60)
        expected = checkpointed_bytes(database, folder)
        assert restore03(url, folder / "theirs.db") == expected
        assert restore05(url, folder / "theirs05.db") == expected
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name and not path.name.startswith("theirs")]
    assert left == []


@pytest.mark.fault("F1")
def test_six_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 6)


@pytest.mark.slow
def test_thirty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 30)
