"""`verify` of a replica in format 0.3 tells agreement, lag, difference and damage apart, without a page table."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyrage
import pytest

import replicator.v3verify
from replicator import Replicator
from replicator.errors import AccessDenied
from replicator.format.v3 import SnapshotInfo, encode_frame, parse_position
from replicator.replay import Replayed
from replicator.storage import open_client
from replicator.storage.file import FileClient
from replicator.storage.v3 import v3_client
from replicator.v3chain import content_of
from replicator.v3plan import plan_v3
from replicator.v3verify import _Comparing, verify_any
from replicator.verify import Verdict, metadata_folder
from tests.compat.v3history import stored
from tests.e2e.databases import connect, insert, until

TIMEOUT_S = 60


class Pair:
    """A database and its replica. Most of its pages are in the file and in no WAL."""

    def __init__(self, folder: Path) -> None:
        self.path, self.url = folder / "a.db", f"file://{folder}/replica"
        self.application = connect(self.path)
        insert(self.application, 200)
        self.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        insert(self.application, 1)

    def replicate(self, **options) -> str:
        with Replicator(self.path, self.url, **{"format": "v0.3", **options}) as engine:
            engine.wait(timeout_s=TIMEOUT_S)
            return engine.status().position

    def verify(self) -> Verdict:
        return verify_any(self.path, open_client(self.url), timeout_s=1)

    def flip(self, pgno: int) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.seek((pgno - 1) * 4096 + 4000)
            file.write(b"x")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.application.close()


def test_a_database_at_rest_agrees_and_nothing_is_left_behind(tmp_path: Path, pair: Pair) -> None:
    position = pair.replicate()
    names = sorted(path.name for path in tmp_path.rglob("*"))
    verdict = pair.verify()
    assert (verdict.finding, verdict.position, verdict.differing, verdict.txid, verdict.reason) == ("agrees", position, 0, 0, "")
    assert verdict.pages == pair.application.execute("PRAGMA page_count").fetchone()[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_what_was_written_since_is_behind(pair: Pair) -> None:
    pair.replicate()
    insert(pair.application, 200)
    verdict = pair.verify()
    assert verdict.finding == "behind"
    assert verdict.differing == verdict.in_wal > 0
    assert "no replicator is running" in verdict.reason
    pair.application.execute("UPDATE t SET v = randomblob(300) WHERE id = 7")  # a page that the WAL did not have
    pair.application.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    verdict = pair.verify()
    assert (verdict.finding, verdict.differing - verdict.in_wal) == ("behind", 0)
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    verdict = pair.verify()
    assert (verdict.finding, verdict.in_wal) == ("behind", 0)
    grown = pair.application.execute("PRAGMA page_count").fetchone()[0] - verdict.pages
    assert verdict.differing > grown > 0  # the first page, too, which holds the size
    insert(pair.application, 1)
    assert pair.verify().finding == "behind"
    pair.replicate()
    assert pair.verify().finding == "agrees"


def test_a_wal_that_was_copied_and_removed_leaves_the_same_pages(pair: Pair) -> None:
    pair.replicate()
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert pair.verify().finding == "agrees"
    pair.flip(4)
    assert (pair.verify().finding, pair.verify().differing) == ("behind", 1)


def test_a_page_that_was_changed_behind_sqlites_back_differs(pair: Pair) -> None:
    position = pair.replicate()
    pair.flip(4)
    verdict = pair.verify()
    assert (verdict.finding, verdict.differing, verdict.in_wal) == ("differs", 1, 0)
    assert position in verdict.reason
    insert(pair.application, 1)  # what is on its way hides nothing
    verdict = pair.verify()
    assert (verdict.finding, verdict.differing - verdict.in_wal) == ("differs", 1)


def test_a_stored_page_that_is_valid_but_not_ours_differs(tmp_path: Path, pair: Pair) -> None:
    row = b"\7" * 300
    pair.application.execute("UPDATE t SET v = ? WHERE id = 7", (row,))
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(pair.application, 1)
    pair.replicate()
    [snapshot] = [info for info in stored(pair.url) if isinstance(info, SnapshotInfo)]
    file = tmp_path / "replica" / snapshot.name
    content = b"".join(content_of(file))
    assert content.count(row) == 1
    file.write_bytes(encode_frame(content.replace(row, b"\7" * 299 + b"x")))
    verdict = pair.verify()
    assert (verdict.finding, verdict.differing) == ("differs", 1)


def test_damage_is_named(tmp_path: Path, pair: Pair) -> None:
    pair.replicate()
    insert(pair.application, 5)
    pair.replicate()
    last = tmp_path / "replica" / stored(pair.url)[-1].name
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    last.write_bytes(data)
    verdict = pair.verify()
    assert (verdict.finding, last.name in verdict.reason) == ("damaged", True)
    (tmp_path / "replica" / stored(pair.url)[0].name).unlink()
    assert pair.verify().finding == "damaged"


def test_newer_ltx_files_are_what_is_compared(pair: Pair) -> None:
    pair.replicate()
    pair.replicate(format="ltx")
    assert (pair.verify().finding, pair.verify().txid, pair.verify().position) == ("agrees", 1, "")
    insert(pair.application, 1)
    position = pair.replicate()
    assert (pair.verify().finding, pair.verify().position) == ("agrees", position)


def test_a_key_that_may_not_list_generations_compares_the_ltx_files(tmp_path: Path, pair: Pair) -> None:
    class Closed(FileClient):
        def list_folders(self, folder: str) -> list[str]:
            raise AccessDenied(f"{self.url}/{folder}")

    pair.replicate()
    pair.replicate(format="ltx")
    verdict = verify_any(pair.path, Closed(tmp_path / "replica"), timeout_s=1)
    assert (verdict.finding, verdict.txid) == ("agrees", 1)


def test_a_restart_during_a_restore_is_held_off_by_a_pin(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    position = pair.replicate()
    client = open_client(pair.url)
    v3 = v3_client(client)
    assert v3 is not None
    outcomes = []

    def busy(*args: object, **options: object) -> Replayed:
        insert(pair.application, 5)
        outcomes.append(pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        insert(pair.application, 5)
        return original(*args, **options)  # type: ignore[arg-type]

    original = replicator.v3verify.write_v3
    monkeypatch.setattr("replicator.v3verify.write_v3", busy)
    pair.application.execute("PRAGMA busy_timeout=0")
    comparing = _Comparing(pair.path, v3, plan_v3, metadata_folder(pair.path, None), True, None)
    found = comparing._look(pinned=True)
    assert (found.position, found.in_place, found.unexplained) == (position, True, 0)
    assert found.past > 0
    found = comparing._look(pinned=False)
    assert (found.position, found.in_place, found.unexplained > 0) == (position, False, True)
    assert outcomes == [1, 0]  # busy, done


def test_a_busy_database_agrees_while_another_process_replicates_it(tmp_path: Path, pair: Pair) -> None:
    config = tmp_path / "litestream.yml"
    settings = {"format": "v0.3", "min-checkpoint-page-count": 30, "replicas": [{"url": pair.url, "sync-interval": "100ms"}]}
    config.write_text(json.dumps({"dbs": [{"path": str(pair.path), **settings}]}))
    command = [sys.executable, "-m", "replicator", "replicate", "-config", str(config)]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    assert any("initialized db" in line for line in engine.stdout)  # the engine's own lines may come before it
    until(lambda: stored(pair.url))
    stop, commits = threading.Event(), 0

    def write() -> None:
        nonlocal commits
        with closing(sqlite3.connect(pair.path, isolation_level=None, timeout=30)) as connection:
            while not stop.wait(0.002):
                connection.execute("UPDATE t SET v = randomblob(300) WHERE id % 20 = abs(random()) % 20")
                commits += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            before = commits
            command = [sys.executable, "-m", "replicator", "verify", "-json", str(pair.path), pair.url]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            [document] = json.loads(done.stdout)
            assert (document["finding"], document["format"], done.returncode) == ("agrees", "0.3", 0), document
            assert commits > before
    finally:
        stop.set()
        thread.join()
        engine.terminate()
        engine.wait(60)
        engine.stdout.close()
    assert pair.verify().finding == "agrees"
    assert parse_position(pair.verify().position).index > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_database(pair: Pair) -> None:
    pair.application.executemany("INSERT INTO t(v) VALUES(zeroblob(?))", [(16 << 20,)] * 24)
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(pair.application, 1)
    pair.replicate()
    code = """
import sys
from replicator.cli import main
code = main(["verify", "-integrity-check", "quick", sys.argv[1], sys.argv[2]])
# Not ru_maxrss: that begins with what the parent had.
print("peak", int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, str(pair.path), pair.url], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert pair.path.stat().st_size > 384 << 20
    assert int(done.stdout.rpartition("peak ")[2]) < 120, done.stdout


def test_the_command_reads_format_and_keys_from_the_configuration(tmp_path: Path, pair: Pair) -> None:
    key = pyrage.x25519.Identity.generate()
    age = {"identities": [str(key)], "recipients": [str(key.to_public())]}
    config = tmp_path / "litestream.yml"
    database = {"path": str(pair.path), "format": "v0.3", "replicas": [{"url": pair.url, "age": age}]}
    config.write_text(json.dumps({"dbs": [database]}))

    def pyrepl(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "replicator", *map(str, arguments)], capture_output=True, text=True, timeout=60)

    assert pyrepl("replicate", "-once", "-config", config).returncode == 0
    done = pyrepl("verify", "-config", config, pair.path)
    assert (done.returncode, done.stderr) == (0, "")
    generation = stored(pair.url)[-1].generation
    assert f"{pair.url}: agrees at {generation}/00000000:" in done.stdout
    insert(pair.application, 5)
    done = pyrepl("verify", "-timeout", "1s", "-config", config, pair.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: age+{pair.url}: behind: ")
