"""kill -9 of a follower at random moments while a writer replicates; and readers that look on all the time.

Each transaction writes one number into forty rows on forty pages, so that a state that was never committed shows.
"""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.follow import Follower, follow, read_txid
from replicator.inplace import InPlace
from replicator.storage import open_client
from tests.e2e.databases import restored

NEVER = threading.Event()


class Writer:
    """The application: `write` commits one transaction; odd ones grow the database, now and then it shrinks."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self.connection.execute("PRAGMA page_size=1024")
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("CREATE TABLE spread(id INTEGER PRIMARY KEY, n INTEGER, pad BLOB)")
        self.connection.execute("CREATE TABLE log(n INTEGER PRIMARY KEY, pad BLOB)")
        self.connection.executemany("INSERT INTO spread(n, pad) VALUES(0, randomblob(?))", [(700,)] * 40)
        self.number = 0

    def write(self) -> None:
        self.number += 1
        self.connection.execute("BEGIN")
        self.connection.execute("UPDATE spread SET n = ?", (self.number,))
        self.connection.execute("INSERT INTO log VALUES(?, randomblob(?))", (self.number, 3000 if self.number % 2 else 10))
        self.connection.execute("COMMIT")
        if self.number % 40 == 0:
            self.connection.execute("UPDATE log SET pad = NULL")
            self.connection.execute("VACUUM")


def committed_number(path: Path) -> int:
    """The transaction whose state this is; fails for a state that was never committed."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        low, high, rows = connection.execute("SELECT min(n), max(n), count(*) FROM spread").fetchone()
        last, logged = connection.execute("SELECT coalesce(max(n), 0), count(*) FROM log").fetchone()
        assert low == high == last == logged
        assert rows == 40
        return int(low)
    finally:
        connection.close()


def plain(path: Path) -> bytes:
    data = path.read_bytes()
    return data[:18] + data[20:24] + data[28:]


SLOW_DISK = """
import sys, time
from replicator import inplace
from replicator.cli import main
sync = inplace.sync_file
inplace.sync_file = lambda file: (time.sleep(0.002), sync(file))
sys.exit(main(sys.argv[1:]))
"""


def start(url: str, output: Path) -> subprocess.Popen[str]:
    """Run the command with a disk that takes its time, so that most kills hit a change."""
    command = [sys.executable, "-c", SLOW_DISK, "restore", "-f", "-follow-interval", "2ms", "-o", str(output), url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_rounds(folder: Path, rounds: int) -> None:
    url, output, judged = f"file://{folder}/replica", folder / "copy/copy.db", folder / "judged/copy.db"
    output.parent.mkdir()
    source, writer = random.Random(5), Writer(folder / "a.db")
    done = threading.Event()
    with Replicator(folder / "a.db", url, sync_interval_s=0.001, min_checkpoint_pages=100) as engine:
        engine.wait(timeout_s=60)

        def write() -> None:
            while not done.wait(0.002):
                writer.write()

        thread = threading.Thread(target=write)
        thread.start()
        number = hot = 0
        try:
            for _ in range(rounds):
                child = start(url, output)
                assert child.stdout is not None
                for _ in range(source.randrange(2, 30)):
                    assert child.stdout.readline()
                time.sleep(source.random() / 100)  # anywhere in a change, not only where a line was printed
                child.send_signal(signal.SIGKILL)
                child.communicate()
                shutil.rmtree(judged.parent, ignore_errors=True)
                shutil.copytree(output.parent, judged.parent)
                hot += (judged.parent / "copy.db-journal").exists()
                now = committed_number(judged)
                assert now >= number
                number = now
        finally:
            done.set()
            thread.join()
        engine.wait(timeout_s=60)
        txid = engine.status().txid
    child = start(url, output)
    assert child.stdout is not None
    while read_txid(output) != txid:
        assert child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    assert committed_number(output) == writer.number
    assert plain(output) == plain(restored(url, folder))
    assert sorted(path.name for path in output.parent.iterdir()) == ["copy.db", "copy.db-lineage", "copy.db-txid"]
    assert hot, "no kill hit a change: the test proves nothing"
    writer.connection.close()


@pytest.mark.fault("F1")
def test_ten_kills_leave_committed_states(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 10)


@pytest.mark.scheduled
@pytest.mark.timeout(900)
def test_a_hundred_kills_leave_committed_states(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 100)


READER = """
import sqlite3, sys, threading
path, stop = sys.argv[1], threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
kept = sqlite3.connect(path, timeout=0.05, isolation_level=None)
polls = busy = last = 0
seen = set()
while not stop.is_set():
    polls += 1
    connection = kept if polls % 3 else sqlite3.connect(path, timeout=0.05, isolation_level=None)
    try:
        connection.execute("BEGIN")
        low, high = connection.execute("SELECT min(n), max(n) FROM spread").fetchone()
        logged = connection.execute("SELECT count(*) FROM log").fetchone()[0]
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        assert "locked" in str(error), error
        busy += 1
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        continue
    finally:
        if connection is not kept:
            connection.close()
    assert low == high == logged >= last, (low, high, logged, last)
    if polls == 1:
        print("reading", flush=True)
    last = low
    seen.add(last)
assert kept.execute("PRAGMA integrity_check").fetchone() == ("ok",)
print(last, polls, len(seen))
"""


def test_readers_see_committed_states_in_order_and_nothing_worse_than_busy(tmp_path: Path) -> None:
    url, output, writer = f"file://{tmp_path}/replica", tmp_path / "copy.db", Writer(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", url) as engine:
        engine.wait(timeout_s=60)
        client, stop = open_client(url), threading.Event()
        follow(client, output, stop=stop, applied=lambda _: stop.set())
        command = [sys.executable, "-c", READER, str(output)]
        readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "reading\n"
        txid = read_txid(output)
        assert txid is not None
        with InPlace(output) as copy:
            follower = Follower(client, copy, txid)
            applied: list[int] = []
            follower._applied = applied.append
            while len(applied) < 100:
                writer.write()
                engine.wait(timeout_s=60)
                follower.tick(NEVER)
        for reader in readers:
            text, _ = reader.communicate("", timeout=60)
            assert reader.returncode == 0
            last, polls, seen = map(int, text.split())
            assert last == writer.number
            assert polls > 100
            assert seen > 20
    assert plain(output) == plain(restored(url, tmp_path))
    assert not output.with_name("copy.db-wal").exists()
    writer.connection.close()
