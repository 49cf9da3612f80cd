"""`verify` and scheduled drills tell agreement, lag, difference and damage apart."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from replicator import Replicator
from replicator.errors import DatabaseNotFound, NotADatabase, NotWALMode
from replicator.format.ltx import TXID, decode_file, encode_file
from replicator.storage import open_client
from replicator.verify import Verdict, drill, verify
from tests.e2e.databases import connect, insert

TIMEOUT_S = 60


class Pair:
    """A database and its replica."""

    def __init__(self, folder: Path) -> None:
        self.path, self.url = folder / "a.db", f"file://{folder}/replica"
        self.application = connect(self.path)
        insert(self.application, 200)

    def replicate(self) -> None:
        with Replicator(self.path, self.url, history=None) as engine:  # with one, level 0 may be merged before a test changes a file of it
            engine.wait(timeout_s=TIMEOUT_S)

    def verify(self) -> Verdict:
        return verify(self.path, open_client(self.url), timeout_s=1)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    made.replicate()
    yield made
    made.application.close()


def test_a_database_at_rest_agrees_and_nothing_is_left_behind(tmp_path: Path, pair: Pair) -> None:
    names = sorted(path.name for path in tmp_path.rglob("*"))
    verdict = pair.verify()
    assert (verdict.finding, verdict.txid, verdict.differing, verdict.reason) == ("agrees", 1, 0, "")
    assert verdict.pages == pair.application.execute("PRAGMA page_count").fetchone()[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_what_was_written_since_is_behind(pair: Pair) -> None:
    insert(pair.application, 20)
    verdict = pair.verify()
    assert verdict.finding == "behind"
    assert verdict.differing == verdict.in_wal > 0
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(pair.application, 1)
    assert pair.verify().finding == "behind"
    pair.replicate()
    assert pair.verify().finding == "agrees"


def test_a_page_that_was_changed_behind_sqlites_back_differs(pair: Pair) -> None:
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    insert(pair.application, 1)  # so that the page is in the file and in no WAL
    pair.replicate()
    with pair.path.open("r+b", buffering=0) as file:
        file.seek(3 * 4096 + 4000)
        file.write(b"x")
    verdict = pair.verify()
    assert (verdict.finding, verdict.differing, verdict.in_wal) == ("differs", 1, 0)


def test_a_stored_file_that_is_valid_but_not_ours_differs(tmp_path: Path, pair: Pair) -> None:
    stored = tmp_path / f"replica/ltx/0/{1:016x}-{1:016x}.ltx"
    header, pages, _ = decode_file(stored.read_bytes())
    pages[-1] = (pages[-1][0], bytes(4096))
    stored.write_bytes(encode_file(header, pages))
    # A leaf of zeros is no healthy page either; without SQLite's check the difference is found all the same.
    assert pair.verify().finding == "damaged"
    pages[-1] = (pages[-1][0], decode_file(encode_file(header, pages))[1][-2][1])
    stored.write_bytes(encode_file(header, [*pages[:-1], pages[-1]]))
    assert pair.verify().finding in ("damaged", "differs")


def test_rows_that_were_changed_in_the_replica_differ(tmp_path: Path, pair: Pair) -> None:
    """A healthy database, in a valid file, that is another one than was replicated."""
    other = connect(tmp_path / "other.db")
    insert(other, 300)
    with Replicator(tmp_path / "other.db", f"file://{tmp_path}/others", history=None) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    other.close()
    name = f"{1:016x}-{1:016x}.ltx"
    (tmp_path / "replica/ltx/0" / name).write_bytes((tmp_path / "others/ltx/0" / name).read_bytes())
    verdict = pair.verify()
    assert verdict.finding == "differs"
    assert "is not what was replicated under it" in verdict.reason


def test_a_flipped_bit_is_damage(tmp_path: Path, pair: Pair) -> None:
    stored = tmp_path / f"replica/ltx/0/{1:016x}-{1:016x}.ltx"
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 4
    stored.write_bytes(data)
    verdict = pair.verify()
    assert verdict.finding == "damaged"
    assert stored.name in verdict.reason


def test_a_database_that_is_damaged_itself_is_found_by_the_drill(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.application.execute("CREATE INDEX i ON t(v)")
    root = pair.application.execute("SELECT rootpage FROM sqlite_master WHERE name='i'").fetchone()[0]
    pair.application.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    pair.application.close()
    with pair.path.open("r+b") as file:
        file.seek((root - 1) * 4096 + 5)
        file.write(b"\xff\xff")
    pair.replicate()
    assert pair.verify().finding == "damaged"


def test_a_replica_that_lost_its_newest_file_is_behind(tmp_path: Path, pair: Pair) -> None:
    with Replicator(pair.path, pair.url, history=None) as engine:
        insert(pair.application, 5)
        engine.wait(timeout_s=TIMEOUT_S)
    (tmp_path / f"replica/ltx/0/{2:016x}-{2:016x}.ltx").unlink()
    verdict = pair.verify()
    assert verdict.finding == "behind"
    assert "0000000000000002" in verdict.reason


def test_a_busy_database_agrees_while_another_process_replicates_it(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    command = [sys.executable, "-m", "replicator", "replicate", str(pair.path), pair.url]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    assert any("initialized db" in line for line in engine.stdout)  # the engine's own lines may come before it
    stop = threading.Event()

    def write() -> None:
        connection = sqlite3.connect(pair.path, isolation_level=None, timeout=30)
        while not stop.wait(0.002):
            connection.execute("UPDATE t SET v = randomblob(300) WHERE id = abs(random()) % 200 + 1")
        connection.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(5):
            done = subprocess.run(
                [sys.executable, "-m", "replicator", "verify", "-json", str(pair.path), pair.url],
                capture_output=True,
                text=True,
                timeout=120,
            )
            [document] = json.loads(done.stdout)
            assert (document["finding"], done.returncode) == ("agrees", 0), document
    finally:
        stop.set()
        thread.join()
        engine.terminate()
        engine.wait(60)
        engine.stdout.close()
    assert pair.verify().finding == "agrees"
    pair.application.close()


def test_the_command_says_what_it_found_and_exits_with_it(tmp_path: Path, pair: Pair) -> None:
    def pyrepl(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "replicator", *map(str, arguments)], capture_output=True, text=True, timeout=60)

    done = pyrepl("verify", pair.path, pair.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"agrees at TXID {1:016x}" in done.stdout
    insert(pair.application, 5)
    done = pyrepl("verify", "-timeout", "1s", pair.path, pair.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {pair.url}: behind: ")
    for wrong in (["verify"], ["verify", "-integrity-check", "none", pair.path, pair.url], ["verify", "a", "b", "c"]):
        assert pyrepl(*wrong).returncode == 2
    done = pyrepl("verify", tmp_path / "none.db", pair.url)
    assert (done.returncode, "does not exist" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_what_is_no_database_in_wal_mode_is_refused_unchanged(tmp_path: Path) -> None:
    client = open_client(f"file://{tmp_path}/replica")
    with pytest.raises(DatabaseNotFound):
        verify(tmp_path / "none.db", client)
    with pytest.raises(NotADatabase):
        verify(tmp_path, client)
    (tmp_path / "text").write_bytes(os.urandom(5000))
    with pytest.raises(NotADatabase):
        verify(tmp_path / "text", client)
    connection = sqlite3.connect(tmp_path / "plain.db")
    connection.execute("CREATE TABLE t(a)")
    connection.close()
    before = (tmp_path / "plain.db").read_bytes()
    with pytest.raises(NotWALMode):
        verify(tmp_path / "plain.db", client)
    assert (tmp_path / "plain.db").read_bytes() == before


def sample(name: str, path: Path, url: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"db": str(path), "replica": url})


@pytest.mark.fault("F68")
def test_drills_on_a_schedule_show_in_status_and_metrics(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with Replicator(pair.path, pair.url, verify_interval_s=0.05, history=None) as engine:

        def until_verified(txid: int, wants_error: bool) -> None:
            with engine._board.changed:
                assert engine._board.changed.wait_for(
                    lambda: (
                        (found := engine.status().replicas[0].verified) is not None
                        and found.txid >= txid
                        and bool(found.error) == wants_error
                    ),
                    TIMEOUT_S,
                )

        txid = engine.wait(timeout_s=TIMEOUT_S)
        until_verified(txid, wants_error=False)
        assert sample("pyrepl_verify_ok", pair.path, pair.url) == 1
        assert engine.status().state == "replicating"
        stored = tmp_path / f"replica/ltx/0/{1:016x}-{1:016x}.ltx"
        data = bytearray(stored.read_bytes())
        data[len(data) // 2] ^= 4
        stored.write_bytes(data)
        insert(pair.application, 5)
        txid = engine.wait(timeout_s=TIMEOUT_S)
        until_verified(TXID(txid), wants_error=True)
        assert sample("pyrepl_verify_ok", pair.path, pair.url) == 0
        status = engine.status()
        assert status.state == "degraded"
        assert status.replicas[0].verified is not None
        assert stored.name in str(status.replicas[0].verified.error)
    pair.application.close()


def test_what_a_killed_drill_left_behind_stops_nothing_and_is_removed(tmp_path: Path, pair: Pair) -> None:
    left = [tmp_path / ".a.db-litestream/pyrepl/scratch/.pyrepl-drill-x", tmp_path / ".a.db-litestream/pyrepl/.pyrepl-drill-y"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "drill.db").write_bytes(b"x")
    pair.replicate()
    assert not left[0].exists()
    assert pair.verify().finding == "agrees"
    assert not left[1].exists()


def test_a_drill_without_room_on_the_disk_is_an_error_and_takes_none(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no room for a drill restore"):
        drill(open_client(pair.url), tmp_path, needs_bytes=1 << 60)
    assert list(tmp_path.glob(".pyrepl-drill-*")) == []
